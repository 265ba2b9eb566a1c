"""Device functions that the readout's kernels share: splits of the keys, and products of keys with a few rows.

A readout has R ≤ 16 rows per sequence and is bound by reading K and V once. A tile of scores is laid out keys first,
[N, R], because bias, positions and rows of the result belong to keys. Scores are natural (see ``scores.py``): in a
kernel bound by memory, one more product per score costs nothing, and large scores keep their digits.

A single row (R = 1) is multiplied element by element, without shared memory or barriers in the loop. Key n of a tile
belongs to *slot* n mod SLOTS, which has its own sums. There are as many slots as the program's threads hold rows at a
time, so that a slot stays in its threads until all slots are summed after the loop. More rows are padded to the 16 of a
tensor core.

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
    """Return this program's head, split and sequence; neighbours read adjacent heads of the same tokens."""
    program = tl.program_id(0)
    return program % heads, program // heads % splits, program // heads // splits


@triton.jit
def split_bounds(length, split, splits, BLOCK_N: tl.constexpr):
    """Return the first key and the end of a split, made of full tiles so that dropout's groups of four are not cut."""
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_N), splits)
    begin = tl.minimum(split * tiles * BLOCK_N, length)
    return begin, tl.minimum(begin + tiles * BLOCK_N, length)


@triton.jit
def load_readout(x, sequence, head, queries, HEAD_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Load the rows of one sequence and head, [R, D]; padded rows and columns are 0."""
    base_ptr = x.ptr + sequence.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h
    rows = tl.arange(0, BLOCK_R)
    return load_rows(base_ptr, 0, rows, x.stride_t, rows < queries, HEAD_WIDTH, BLOCK_D, False, True)


@triton.jit
def load_lse(lse_ptr, offset, heads, queries, BLOCK_R: tl.constexpr):
    """Load lse of the rows of a sequence and head, [R]; +∞, for weights of 0, in rows without keys and in padding."""
    rows = tl.arange(0, BLOCK_R)
    lse = tl.load(lse_ptr + offset + rows * heads, mask=rows < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weights_of(scores, lse, lse_rest_ptr, offset, heads, queries, BLOCK_R: tl.constexpr):
    """Return the weights of scores [N, R], given lse and, for scores with a bias, its rest."""
    weights = exponential(scores - lse[None, :])
    if lse_rest_ptr is not None:
        rows = tl.arange(0, BLOCK_R)
        rest = tl.load(lse_rest_ptr + offset + rows * heads, mask=rows < queries, other=0.0)
        weights = exponential(scores - lse[None, :] - rest[None, :])
    return weights


@triton.jit
def load_row_gradient(drows, head, start, first, inside, queries, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the gradients of a tile's weights, [N, R], from (R, H, T); 0 past the end."""
    rows, keys = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    row_ptr = sequence_base(drows.ptr, rows, head, start + first, drows.stride_b, drows.stride_h, drows.stride_t, False)
    mask = inside[:, None] & (rows < queries)[None, :]
    pointers = row_ptr[None, :] + keys.to(tl.int64)[:, None] * drows.stride_t
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def products(keys, rows, BLOCK_R: tl.constexpr):
    """Multiply keys [N, D] by rows [R, D]: [N, R] in float32."""
    if BLOCK_R == 1:
        result = tl.sum(keys.to(tl.float32) * rows.to(tl.float32), 1, keep_dims=True)
    else:
        result = dot(keys, tl.trans(rows))
    return result


@triton.jit
def weighted_sum(weights, keys, BLOCK_R: tl.constexpr, SLOTS: tl.constexpr):
    """Multiply weightsᵀ [R, N] by keys [N, D] in float32: [R, D], or for one row the sums of each slot, [SLOTS, D]."""
    if BLOCK_R == 1:
        weighted = weights * keys.to(tl.float32)
        result = tl.sum(tl.reshape(weighted, [keys.shape[0] // SLOTS, SLOTS, keys.shape[1]]), 0)
    else:
        result = dot(tl.trans(weights.to(keys.dtype)), keys)
    return result


@triton.jit
def spread(weights, rows, BLOCK_R: tl.constexpr):
    """Multiply weights [N, R] by rows [R, D]: [N, D] in float32."""
    return weights * rows.to(tl.float32) if BLOCK_R == 1 else dot(weights.to(rows.dtype), rows)
