"""The specification of the operations over a process group: each process gets all rows, and takes its own results.

Eager, any dtype, differentiable by autograd; it holds all that the group holds. Rows are laid end to end sequence after
sequence, whatever process has them, and go through ``maskattn.attention.reference``: so results are those of one
process, dropout included. The ring and the gathered exchange are tested against it.

Dimension key: Tq, Tk and T rows of this process, B sequences, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskattn.attention import reference
from maskattn.distributed.shards import Shards, starts_of
from maskattn.distributed.transport import add_up
from maskattn.options import Options

__all__ = ["packed_attention", "readout", "token_relevance"]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Shards, keys: Shards, options: Options
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, D) and lse (H, Tq) of this process's queries over the keys of all."""
    whole = _of_all_keys(options, keys)
    if options.coords_q is not None:
        whole = replace(whole, coords_q=_of_all(options.coords_q, queries))
    starts = starts_of(queries.total, q.device), starts_of(keys.total, k.device)
    out, lse = reference.packed_attention(_of_all(q, queries), _of_all(k, keys), _of_all(v, keys), *starts, whole)
    return out[queries.positions], lse[:, queries.positions]


def readout(q: Tensor, k: Tensor, v: Tensor, keys: Shards, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, R, H, D) and lse (B, R, H) over the keys of all, and the attention rows (R, H, T) of this process's."""
    whole = _of_all_keys(options, keys)
    starts = starts_of(keys.total, k.device)
    out, lse, rows = reference.readout(q, _of_all(k, keys), _of_all(v, keys), starts, whole)
    return out, lse, rows[..., keys.positions]


def token_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
    keys: Shards,
    options: Options,
) -> Tensor:
    """S (K, T) of this process's tokens."""
    origins = (x if x is None or x.ndim == 2 else _of_all(x, keys) for x in (key_origin, value_origin))
    key_origin, value_origin = origins
    starts = starts_of(keys.total, k.device)
    given = q, _of_all(k, keys), _of_all(v, keys), grad_out, key_origin, value_origin
    return reference.token_relevance(*given, starts, _of_all_keys(options, keys))[:, keys.positions]


def _of_all_keys(options: Options, keys: Shards) -> Options:
    bias, coords_k = options.key_bias, options.coords_k
    return replace(
        options,
        key_bias=None if bias is None else _of_all(bias, keys),
        coords_k=None if coords_k is None else _of_all(coords_k, keys),
    )


def _of_all(rows: Tensor, shards: Shards) -> Tensor:
    whole: Tensor = _AllRows.apply(rows, shards)
    return whole


class _AllRows(torch.autograd.Function):
    """The rows of all processes, sequence after sequence; a row's gradient is the sum of what all processes find."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        whole = rows.new_zeros((sum(shards.total), *rows.shape[1:]))
        whole[shards.positions] = rows
        return add_up(whole, shards.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shards: Shards = ctx.shards
        return add_up(grads[0].clone(memory_format=torch.contiguous_format), shards.group)[shards.positions], None
