"""The specification of a readout over a process group: each process gathers all rows, and keeps its own results.

It is eager, supports any dtype, is differentiable by autograd, and holds the rows of the entire group. Rows are
concatenated sequence by sequence, whichever process holds them, and passed to ``maskattn.attention.reference``, so that
results equal those of one process, including dropout. ``packed_attention`` needs none of its own: the exchanges pass
``maskattn.attention.reference`` the keys of one process after the other.

Dimension key: T rows of this process, B sequences, R readout queries, H heads, D head width, K classes.
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

__all__ = ["readout", "token_relevance"]


def readout(q: Tensor, k: Tensor, v: Tensor, keys: Shards, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, R, H, D), lse (B, R, H) over all keys, and the attention rows (R, H, T) of this process's keys."""
    of_all = _of_all_keys(options, keys)
    starts = starts_of(keys.total, k.device)
    out, lse, rows = reference.readout(q, _of_all(k, keys), _of_all(v, keys), starts, of_all)
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
    """Return S (K, T) of this process's tokens."""
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
    gathered: Tensor = _AllRows.apply(rows, shards)
    return gathered


class _AllRows(torch.autograd.Function):
    """Gather the rows of all processes, sequence by sequence; a row's gradient is summed over all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        gathered = rows.new_zeros((sum(shards.total), *rows.shape[1:]))
        gathered[shards.positions] = rows
        return add_up(gathered, shards.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shards: Shards = ctx.shards
        return add_up(grads[0].clone(memory_format=torch.contiguous_format), shards.group)[shards.positions], None
