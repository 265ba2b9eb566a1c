"""``readout`` and ``token_relevance`` over a process group: every process has all queries and some of the keys.

Each process reads out its own keys, and the results are combined by their lse: only a few rows are exchanged, however
many keys there are.

Dimension key: B sequences, T rows of this process, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskattn.attention import operations
from maskattn.attention.calls import as_asked, as_autocast, options_of_call
from maskattn.attention.checks import check_bias, check_coords, check_readout, check_relevance
from maskattn.attention.implementation import choose
from maskattn.attention.ops import flat_options
from maskattn.distributed import reference
from maskattn.distributed.call import check_rows, describe, together, with_seed_of_first
from maskattn.distributed.combine import combine
from maskattn.distributed.partial import placed
from maskattn.distributed.shards import Shards
from maskattn.options import Options
from maskattn.shapes import Float

__all__ = ["readout", "token_relevance"]


def readout(
    q: Float[Tensor, "B R H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    shards: Shards,
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: tuple[Float[Tensor, "B R 2"], Float[Tensor, "T 2"]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    dropout_p: float = 0.0,
    return_rows: bool = False,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "B R H D"] | tuple[Float[Tensor, "..."], ...]:
    """:func:`maskattn.readout` of keys that are on several processes, all of which call it with the same queries.

    All processes receive the same output, bit for bit, and each the attention rows of its own keys. The gradient of q
    is the contribution of this process's keys, to be summed over the processes like those of weights. The output
    enters the loss of every process (:mod:`maskattn.distributed.combine`).

    Args:
        q: (B, R, H, D) float, 1 ≤ R ≤ 16, the same in all processes.
        k, v: (T, H, D), this process's keys and values.
        shards: how the keys are divided.
        scale, slopes, impl: as for ``maskattn.readout``; the same in all processes.
        key_bias: as for ``maskattn.readout``, for this process's keys.
        coords: as for ``maskattn.readout``, a pair for the queries and this process's keys.
        dropout_p: as for ``maskattn.readout``; weights are dropped by their positions in whole sequences, with the seed
            of process 0.
        return_rows: also return the attention rows (R, H, T) of this process's keys.
        return_lse: also return the log-sum-exp of the scores over all keys, (B, R, H), differentiable.

    Returns:
        out (B, R, H, D), followed by rows and lse, in this order, if requested.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
        GroupError: another process makes a different call or none, refuses its arguments, or has ended.
    """

    def prepare() -> tuple[tuple[Tensor, ...], Options, str]:
        given = as_autocast(q, k, v)
        options = _checked(given, shards, key_bias, coords, slopes, scale, dropout_p)
        return given, options, choose(impl, given[0], options)

    def description(call: tuple[tuple[Tensor, ...], Options, str]) -> dict[str, object]:
        (q_, k_, v_), options, chosen = call
        learnt = {"q": q_, "k": k_, "v": v_, "key_bias": options.key_bias, "slopes": options.slopes}
        asked = {"queries": tuple(q_.shape[:2]), "return_rows": return_rows}
        return describe(q_, learnt, options, chosen) | asked

    given, options, chosen = together("readout", shards, prepare, description)
    out, lse, rows = _read(given, shards, options, return_rows, chosen)
    return as_asked(out, rows, lse, return_rows, return_lse)


def token_relevance(
    q: Float[Tensor, "B R H D"],
    k: Float[Tensor, "T H D"],
    v: Float[Tensor, "T H D"],
    out: Float[Tensor, "B R H D"],
    lse: Float[Tensor, "B R H"],
    grad_out: Float[Tensor, "K B R H D"],
    shards: Shards,
    *,
    key_origin: Float[Tensor, "..."] | None = None,
    value_origin: Float[Tensor, "..."] | None = None,
    scale: float | None = None,
    key_bias: Float[Tensor, "..."] | None = None,
    coords: tuple[Float[Tensor, "B R 2"], Float[Tensor, "T 2"]] | None = None,
    slopes: Float[Tensor, "H"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "K T"]:
    """:func:`maskattn.token_relevance` of this process's tokens in a :func:`readout` of all processes' keys.

    Args:
        q, k, v, shards, scale, key_bias, coords, slopes: the arguments of the readout.
        out, lse: the results of the readout.
        grad_out: (K, B, R, H, D), each class's gradient with respect to ``out``, the same in all processes.
        key_origin, value_origin: (H, D), the same in all processes, or (T, H, D) of this process's tokens; as for
            ``maskattn.token_relevance``.
        impl: as for ``maskattn.token_relevance``.

    Returns:
        S (K, T) of this process's tokens, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``impl`` lacks a feature of the call.
        GroupError: another process makes a different call or none, refuses its arguments, or has ended.
    """

    def prepare() -> tuple[Options, str]:
        options = _checked((q, k, v), shards, key_bias, coords, slopes, scale, 0.0)
        check_relevance(q, k, out, lse, grad_out, key_origin, value_origin)
        return options, choose(impl, q, options)

    def description(call: tuple[Options, str]) -> dict[str, object]:
        return describe(q, {}, *call) | {"classes": len(grad_out), "queries": tuple(q.shape[:2])}

    options, chosen = together("token_relevance", shards, prepare, description)
    with torch.no_grad():
        if chosen == "reference":
            of_classes = grad_out.to(q.dtype), key_origin, value_origin
            return reference.token_relevance(q, k, v, *of_classes, shards, options)
        if operations.is_large(lse):
            # A float32 lse is too coarse; weights are computed from this process's own lse, whose rounding is known.
            own = _parts(q, k, v, shards, options, False, chosen)
            share_BRH = combine(own[0], own[1], shards.group)[2]
            grad_out, lse = grad_out * share_BRH.to(grad_out.dtype)[..., None], own[2]
        lengths = shards.cu_seqlens, shards.max_seqlen
        given = q, k, v, out, lse, grad_out.to(q.dtype), key_origin, value_origin
        tensors = [None if x is None else x.detach() for x in given]
        relevance: Tensor = operations.token_relevance(*tensors, *lengths, *flat_options(options), chosen)
    return relevance


def _checked(
    given: tuple[Tensor, ...],
    shards: Shards,
    key_bias: Tensor | None,
    coords: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Options:
    q, k, v = given
    check_rows("k", k, shards)
    check_readout(q, k, v, shards.cu_seqlens)
    (B, R, H, _), T = q.shape, k.shape[0]
    check_bias(key_bias, q, ((T,), (T, H)), "(T,) or (T, H)")
    positions = check_coords(coords, slopes, q, H, (B, R), (T,))
    return options_of_call(q, scale, key_bias, slopes, positions, dropout_p)


def _read(
    given: tuple[Tensor, ...], shards: Shards, options: Options, return_rows: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = given
    options = with_seed_of_first(options, shards)
    if impl == "reference":
        return reference.readout(q, k, v, shards, options)
    own_out, exact, own_lse, rows = _parts(q, k, v, shards, options, return_rows, impl)
    out, lse, share_BRH = combine(own_out, exact, shards.group)
    if return_rows:
        sequence = torch.repeat_interleave(shards.cu_seqlens.diff().long(), output_size=shards.rows)
        rows = rows * share_BRH.permute(1, 2, 0)[..., sequence].to(rows.dtype)
    return out.to(q.dtype), lse.to(own_lse.dtype), rows


def _parts(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, options: Options, return_rows: bool, impl: str
) -> tuple[Any, ...]:
    """Return out, lse in float64 with its rounding remainder, lse as computed, and rows, over this process's keys."""
    lengths = shards.cu_seqlens, shards.max_seqlen
    own = flat_options(placed(options, None, shards, shards.rank))
    out, lse, rest, rows = operations.readout(q, k, v, *lengths, *own, True, return_rows, impl)
    exact = lse.double() + rest.detach().double() if rest.numel() else lse.double()
    return out, exact, lse, rows
