"""``packed_attention`` over a process group: queries stay in their process, and keys and values are sent to them.

Dimension key: Tq and Tk rows of this process, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskattn.attention.calls import as_autocast, options_of_call
from maskattn.attention.checks import check_bias, check_coords, check_packed
from maskattn.attention.implementation import choose
from maskattn.attention.ops import without_autocast
from maskattn.distributed import gathered, ring
from maskattn.distributed.call import check_rows, check_shards, describe, together, with_seed_of_first
from maskattn.distributed.choice import EXCHANGES, choose_exchange
from maskattn.distributed.partial import Keys
from maskattn.distributed.shards import Shards
from maskattn.options import Options
from maskattn.results import Outputs
from maskattn.shapes import Float

__all__ = ["packed_attention"]


def packed_attention(
    q: Float[Tensor, "Tq H D"],
    k: Float[Tensor, "Tk H D"],
    v: Float[Tensor, "Tk H D"],
    shards: Shards | tuple[Shards, Shards],
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: Float[Tensor, "T 2"] | tuple[Float[Tensor, "Tq 2"], Float[Tensor, "Tk 2"]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    impl: str | None = None,
    exchange: str | None = None,
) -> Float[Tensor, "Tq H D"] | tuple[Float[Tensor, "Tq H D"], Float[Tensor, "H Tq"]]:
    """:func:`maskattn.packed_attention` of sequences whose rows are on several processes, all of which call it.

    Each process passes its own rows, and receives the output of its own queries over the keys of all processes. Results
    equal those of one process to rounding. Gradients are those of the sum of all processes' losses: every process must
    backpropagate through its output.

    Args:
        q: (Tq, H, D) float, this process's queries.
        k, v: (Tk, H, D), this process's keys and values.
        shards: how the rows are divided; a pair for queries and keys if these differ.
        scale, impl: as for ``maskattn.packed_attention``; the same in all processes.
        key_bias, coords: as for ``maskattn.packed_attention``, for this process's rows.
        slopes: (H,), the same in all processes; its gradient is the contribution of this process's queries, to be
            summed over the processes like those of other weights.
        dropout_p: as for ``maskattn.packed_attention``; weights are dropped by their positions in whole sequences, with
            the seed of process 0.
        return_lse: also return the log-sum-exp of the scores, (H, Tq), differentiable.
        exchange: "ring" passes keys and values around, and a process holds those of at most three processes. "gather"
            sends a process all keys that its queries need, and attends once. None chooses "gather" if it holds few
            keys (:mod:`maskattn.distributed.choice`).

    Returns:
        out (Tq, H, D), or (out, lse).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
        GroupError: another process makes a different call or none, refuses its arguments, or has ended.
    """
    queries, keys = shards if isinstance(shards, tuple) else (shards, shards)
    check_shards(queries, keys)

    def prepare() -> _Call:
        given = as_autocast(q, k, v)
        check_packed(*given)
        for name, x, divided in (("q", q, queries), ("k", k, keys)):
            check_rows(name, x, divided)
        (Tq, H, _), Tk = q.shape, k.shape[0]
        check_bias(key_bias, q, ((Tk,), (Tk, H)), "(Tk,) or (Tk, H)")
        positions = check_coords(coords, slopes, q, H, (Tq,), (Tk,))
        options = options_of_call(given[0], scale, key_bias, slopes, positions, dropout_p)
        return _Call(given, options, choose(impl, given[0], options), queries, keys, _exchange(exchange))

    call = together("packed_attention", queries, prepare, _Call.description)
    out, lse = call.run(return_lse)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Call:
    """A checked call.

    Attributes:
        qkv: q, k and v.
        options: the options of the call, for packed tensors.
        impl: the name of the implementation.
        queries, keys: the shards of queries and keys.
        exchange: the name of the exchange; None chooses by size.
    """

    qkv: tuple[Tensor, ...]
    options: Options
    impl: str
    queries: Shards
    keys: Shards
    exchange: str | None

    def description(self) -> dict[str, object]:
        q, k, v = self.qkv
        learnt = {"q": q, "k": k, "v": v, "key_bias": self.options.key_bias, "slopes": self.options.slopes}
        return describe(q, learnt, self.options, self.impl) | {"exchange": self.exchange}

    def run(self, need_lse: bool) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv
        options = with_seed_of_first(self.options, self.keys)
        exchange = self.exchange or choose_exchange(self.queries, self.keys, Keys.of(k, v, options).nbytes_of_row)
        layout = _Layout(self.queries, self.keys, self.impl, exchange, need_lse)
        with without_autocast(q):
            out, lse = _Attention.apply(q, k, v, options.key_bias, options.slopes, options, layout)
        return out, lse


@dataclass(frozen=True)
class _Layout:
    """The arguments of a call that are not tensors."""

    queries: Shards
    keys: Shards
    impl: str
    exchange: str
    need_lse: bool

    @property
    def module(self) -> Any:
        """The exchange's module."""
        return ring if self.exchange == "ring" else gathered

    @property
    def where(self) -> tuple[Shards, Shards]:
        """The shards of queries and keys."""
        return self.queries, self.keys


# The tensors among the options of a call.
_TENSORS = ("key_bias", "slopes", "coords_q", "coords_k", "dropout_seed")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        slopes: Tensor | None,
        options: Options,
        layout: _Layout,
    ) -> tuple[Tensor, Tensor]:
        own = Keys.of(k, v, options)
        found: Outputs = layout.module.forward(q, own, *layout.where, options, layout.need_lse, layout.impl)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            q, k, v, *(getattr(options, name) for name in _TENSORS), found.out, found.lse, found.lse_rest
        )
        ctx.layout = layout
        ctx.numbers = {name: getattr(options, name) for name in ("scale", "dropout_p", "precision", "deterministic")}
        return found.out, found.lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *of_options, out, lse, lse_rest = ctx.saved_tensors
        layout: _Layout = ctx.layout
        options = Options(**dict(zip(_TENSORS, of_options, strict=True)), **ctx.numbers)
        final = Outputs(out, lse, lse_rest)
        grad_out = torch.zeros_like(final.out) if grads[0] is None else grads[0]
        own = Keys.of(k, v, options)
        with without_autocast(q):
            found = layout.module.backward((grad_out, grads[1]), q, own, final, *layout.where, options, layout.impl)
        return found.q, found.k, found.v, found.key_bias, found.slopes, None, None


def _exchange(name: str | None) -> str | None:
    if name is not None and name not in EXCHANGES:
        raise ValueError(
            f"exchange must be one of {', '.join(EXCHANGES)} or None, got exchange={name!r}; None chooses by size"
        )
    return name
