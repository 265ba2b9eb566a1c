"""Attention of this process's queries over a block of the keys, by the registered ops, and the merging of such blocks.

With l_i and o_i the log-sum-exp and the output over block i of the keys:

    lse = log Σ_i exp(l_i)        out = Σ_i exp(l_i − lse) o_i

The derivatives of a block follow in one of two ways. An implementation that recomputes the attention weights from the
given lse receives lse and output over all keys, and returns the block's contribution. One that starts again from q, k
and v receives the block's own lse and output, and with w = exp(l_i − lse) the gradients  w dO  of o_i and
w (dO·(o_i − out) + dlse)  of l_i.

Dropout changes nothing in this: l_i is the log-sum-exp before it, as lse is, and o_i and out are the outputs after it.
A block's weights are dropped by the positions that its queries and keys have in the whole sequences (:func:`placed`).

lse is accumulated in float64, with the remainders of its rounding: a shift common to all blocks would become visible
otherwise.

Dimension key: Tq queries, Tk keys of a block, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from maskattn.attention import operations
from maskattn.attention.implementation import implementation, keeps_rest
from maskattn.attention.ops import flat_options
from maskattn.distributed.shards import Shards
from maskattn.operands import Sequences
from maskattn.options import DIFFERENTIABLE, Options
from maskattn.results import Gradients, Outputs

__all__ = ["Keys", "Whole", "attend", "differentiate", "placed", "share_of", "wide"]


@dataclass(frozen=True)
class Keys:
    """A block of keys with their values, biases and coordinates.

    Attributes:
        k, v: (Tk, H, D) keys and values.
        key_bias, coords_k: see :class:`~maskattn.options.Options`; None if not given.
    """

    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    coords_k: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, options: Options) -> Keys:
        """Return the keys of a call."""
        return cls(k, v, options.key_bias, options.coords_k)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are not None, in order."""
        return [x for x in vars(self).values() if x is not None]

    def with_tensors(self, tensors: list[Tensor]) -> Keys:
        """Return a block with other tensors instead of :attr:`tensors`."""
        given = [name for name, x in vars(self).items() if x is not None]
        return replace(self, **dict(zip(given, tensors, strict=True)))

    def options(self, of_call: Options) -> Options:
        """Return the options of a call, for these keys."""
        return replace(of_call, key_bias=self.key_bias, coords_k=self.coords_k)

    @property
    def nbytes_of_row(self) -> int:
        """Bytes of a key with its value, bias and coordinates."""
        return sum(x.element_size() * x[:1].numel() if len(x) else x.element_size() * _row(x) for x in self.tensors)


def _row(x: Tensor) -> int:
    count = 1
    for size in x.shape[1:]:
        count *= size
    return count


def placed(options: Options, queries: Shards | None, keys: Shards | None, source: int = 0) -> Options:
    """Return the options for chunks of sequences, with the positions by which dropout needs to know them.

    Args:
        options: the options of the call.
        queries: the shards of this process's queries; None for those of whole sequences.
        keys: the shards of the keys; None for those of whole sequences.
        source: the process whose keys they are.
    """
    if options.dropout_seed is None:
        return options
    return replace(
        options,
        query_offsets=None if queries is None else queries.offsets_of(queries.rank),
        key_offsets=None if keys is None else keys.offsets_of(source),
    )


def attend(q: Tensor, keys: Keys, where: Sequences, options: Options, impl: str, need_lse: bool = True) -> Outputs:
    """Return out (Tq, H, D), lse (H, Tq) and the remainder of its rounding, over these keys only."""
    own = flat_options(keys.options(options))
    return Outputs(*operations.packed_attention(q, keys.k, keys.v, *vars(where).values(), *own, need_lse, impl))


def differentiate(
    grads: tuple[Tensor, Tensor | None],
    q: Tensor,
    keys: Keys,
    whole: Outputs,
    where: Sequences,
    options: Options,
    impl: str,
    of_all_keys: bool = False,
) -> Gradients:
    """Return the contributions of these keys to the gradients of q and slopes, and their own gradients.

    Args:
        grads: the gradients of out and lse over all keys; None for zeros.
        q, keys, where, options, impl: the arguments of :func:`attend`.
        whole: out and lse over all keys.
        of_all_keys: whether these are all keys.
    """
    if not of_all_keys and not implementation(impl).READS_OUTPUTS:
        block = attend(q, keys, where, options, impl)
        grads, whole = share_of(grads, block, whole), block
    given = q, keys.k, keys.v, *vars(whole).values(), *vars(where).values(), *flat_options(keys.options(options))
    found = torch.ops.maskattn.packed_attention_backward(*grads, *given, impl)
    names = [x.name for x in fields(Gradients)]
    each: dict[str, Any] = dict(zip(names, found, strict=True))
    for name in DIFFERENTIABLE:
        if getattr(keys.options(options), name) is None:
            each[name] = None
    return Gradients(**each)


def share_of(grads: tuple[Tensor, Tensor | None], part: Outputs, whole: Outputs) -> tuple[Tensor, Tensor]:
    """Return the gradients of a block's own out and lse, given those of out and lse over all keys."""
    grad_out, grad_lse = grads
    kind = wide(grad_out)
    weight_HQ = (_exact(part) - _exact(whole).masked_fill(whole.lse.isinf(), 0)).exp().to(kind)
    wide_out = grad_out.to(kind)
    along_HQ = (wide_out * (part.out.to(kind) - whole.out.to(kind))).sum(-1).T
    if grad_lse is not None:
        along_HQ = along_HQ + grad_lse.to(kind)
    share = (wide_out * weight_HQ.T[..., None]).to(grad_out.dtype)
    return share.contiguous(), (weight_HQ * along_HQ).to(part.lse.dtype).contiguous()


class Whole:
    """An accumulator that merges the outputs over blocks of keys into the output over all keys.

    Args:
        q: (Tq, H, D) the queries; the result has their dtype.
    """

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._out = torch.zeros(q.shape, dtype=wide(q), device=q.device)
        self._lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64, device=q.device)

    def add(self, part: Outputs) -> None:
        """Merge the outputs over another block."""
        own = _exact(part)
        lse = torch.logaddexp(self._lse, own)
        at = lse.masked_fill(lse == -torch.inf, 0)
        before, now = ((x - at).exp().to(self._out.dtype).T[..., None] for x in (self._lse, own))
        self._out = self._out.mul_(before).addcmul_(part.out.to(self._out.dtype), now)
        self._lse = lse

    def outputs(self, impl: str, options: Options) -> Outputs:
        """Return out, lse and the remainder of its rounding, as ``impl`` expects them in its backward."""
        lse = self._lse.to(wide(self._q) if impl != "reference" else self._q.dtype)
        rest = lse.new_empty(0)
        if keeps_rest(impl, options):
            rest = (self._lse - lse.double()).masked_fill(self._lse.isinf(), 0).to(lse.dtype)
        return Outputs(self._out.to(self._q.dtype), lse, rest)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype for accumulation: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _exact(outputs: Outputs) -> Tensor:
    lse = outputs.lse.double()
    return lse + outputs.lse_rest.double() if outputs.lse_rest.numel() else lse
