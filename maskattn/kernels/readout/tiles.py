"""Pieces that the readout's kernels share: splits of the keys, and products of a tile of keys with a few rows.

A readout has R ≤ 16 rows a sequence and is bound by reading K and V once. A tile of scores is laid out keys first,
[N, R], because bias, positions and rows of the result belong to keys. Scores are natural (see ``scores.py``): where
memory is the bound, one more product for each costs nothing, and large scores keep their digits. One row alone (R = 1)
is multiplied element by element, without shared memory or barriers in the loop: key n of a tile belongs to *slot* n mod
SLOTS, which has sums of its own, and there are as many slots as a program's threads hold rows side by side, so that a
slot stays in its threads until the slots are added up after the loop. More rows are padded to the 16 of a tensor core.

Dimension key: N keys of a tile, R rows (padded to 1 or 16), D head width (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.softmax import exponential
from maskattn.kernels.language.tiles import dot, load_rows, sequence_base

__all__ = [
    "load_lse",
    "load_readout",
    "load_row_gradient",
    "products",
    "readout_position",
    "split_bounds",
    "spread",
    "weighted_sum",
    "weights_of",
]


@triton.jit
def readout_position(heads, splits):
    """Head, split and sequence of this program; neighbours share keys' tokens, whose heads lie side by side."""
    program = tl.program_id(0)
    return program % heads, program // heads % splits, program // heads // splits


@triton.jit
def split_bounds(length, split, splits, BLOCK_N: tl.constexpr):
    """First key and end of a split's share of a sequence: whole tiles, so that dropout's groups of four stay whole."""
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_N), splits)
    begin = tl.minimum(split * tiles * BLOCK_N, length)
    return begin, tl.minimum(begin + tiles * BLOCK_N, length)


@triton.jit
def load_readout(x, sequence, head, queries, HEAD_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """The rows of one sequence and head, [R, D]; padded rows and columns are 0."""
    base_ptr = x.ptr + sequence.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h
    rows = tl.arange(0, BLOCK_R)
    return load_rows(base_ptr, 0, rows, x.stride_t, rows < queries, HEAD_WIDTH, BLOCK_D, False, True)


@triton.jit
def load_lse(lse_ptr, offset, heads, queries, BLOCK_R: tl.constexpr):
    """lse of a sequence and head's rows, [R]; +∞, so weights 0, without keys and for padding."""
    rows = tl.arange(0, BLOCK_R)
    lse = tl.load(lse_ptr + offset + rows * heads, mask=rows < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weights_of(scores, lse, lse_rest_ptr, offset, heads, queries, BLOCK_R: tl.constexpr):
    """The weights of scores [N, R], given lse and, of those with a bias, what rounding took from it."""
    weights = exponential(scores - lse[None, :])
    if lse_rest_ptr is not None:
        rows = tl.arange(0, BLOCK_R)
        rest = tl.load(lse_rest_ptr + offset + rows * heads, mask=rows < queries, other=0.0)
        weights = exponential(scores - lse[None, :] - rest[None, :])
    return weights


@triton.jit
def load_row_gradient(drows, head, start, first, inside, queries, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradients of the weights of a tile, [N, R], of (R, H, T); 0 past the end."""
    rows, keys = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    row_ptr = sequence_base(drows.ptr, rows, head, start + first, drows.stride_b, drows.stride_h, drows.stride_t, False)
    mask = inside[:, None] & (rows < queries)[None, :]
    pointers = row_ptr[None, :] + keys.to(tl.int64)[:, None] * drows.stride_t
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def products(keys, rows, BLOCK_R: tl.constexpr):
    """keys [N, D] times rows [R, D]: [N, R] in float32."""
    if BLOCK_R == 1:
        result = tl.sum(keys.to(tl.float32) * rows.to(tl.float32), 1, keep_dims=True)
    else:
        result = dot(keys, tl.trans(rows))
    return result


@triton.jit
def weighted_sum(weights, keys, BLOCK_R: tl.constexpr, SLOTS: tl.constexpr):
    """weightsᵀ times keys, [N, R] and [N, D], in float32: [R, D], or for one row the sums of each slot, [SLOTS, D]."""
    if BLOCK_R == 1:
        weighted = weights * keys.to(tl.float32)
        result = tl.sum(tl.reshape(weighted, [keys.shape[0] // SLOTS, SLOTS, keys.shape[1]]), 0)
    else:
        result = dot(tl.trans(weights.to(keys.dtype)), keys)
    return result


@triton.jit
def spread(weights, rows, BLOCK_R: tl.constexpr):
    """weights [N, R] times rows [R, D]: [N, D] in float32."""
    return weights * rows.to(tl.float32) if BLOCK_R == 1 else dot(weights.to(rows.dtype), rows)
