"""Pieces that the attention kernels share: tiles of rows, the dot product, the online softmax and the key loop.

Scores are kept in units of log2, with log2(e) folded into the scale and the key bias, because exp2 is what the
hardware has. For a query row with running maximum m, sum l and accumulator a, a tile of scores s updates

    m' = max(m, max s)      p = 2^(s − m')      l' = l·2^(m − m') + Σ p      a' = a·2^(m − m') + p·V

A *side* is the queries or the keys. Sequence b of a side has the positions start to end. Without an index a position is
the row itself (packed and dense tensors); with one (``INDEXED``) it is looked up, so that the kept tokens of a dense
tensor are read where they lie.

Dimension key: M queries of a tile, N keys of a tile, D head width (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b):
    """a @ b in float32; float32 operands stay float32 (no TF32)."""
    if INTERPRETING and a.dtype == tl.bfloat16:
        # The interpreter multiplies bfloat16 operands as raw integers; their products are exact in float32.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, total):
    """total + a @ b, in the accumulator of the tensor core."""
    if INTERPRETING and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def program_place(tiles, heads):
    """Tile, head and sequence of this program; neighbours share a head, so that its keys stay in the cache."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // tiles // heads


@triton.jit
def sequence_span(starts_ptr, ends_ptr, sequence):
    """First position and length of a sequence."""
    start = tl.load(starts_ptr + sequence)
    return start, tl.load(ends_ptr + sequence) - start


@triton.jit
def sequence_base(ptr, sequence, head, start, stride_b, stride_h, stride_t, INDEXED: tl.constexpr):
    """Pointer to the row that offset 0 of a sequence and head means."""
    # 64-bit products: T·H·D passes 2^31 on large slides.
    base = ptr + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    if not INDEXED:
        base += start.to(tl.int64) * stride_t
    return base


@triton.jit
def tile_rows(index_ptr, start, first, inside, BLOCK: tl.constexpr, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """Rows of a tile: looked up, or offsets from ``first``."""
    # [BLOCK]
    rows = tl.arange(0, BLOCK)
    if INDEXED and PARTIAL:
        rows = tl.load(index_ptr + start + first + rows, mask=inside, other=0)
    elif INDEXED:
        rows = tl.load(index_ptr + start + first + rows)
    return rows


@triton.jit
def tile_offsets(first, rows, stride_t, INDEXED: tl.constexpr):
    """Element offsets of the rows of a tile: (64-bit scalar, [BLOCK]), to be added."""
    if INDEXED:
        shift = tl.full([], 0, tl.int64)
        offsets = rows.to(tl.int64) * stride_t
    else:
        # In-tile offsets stay 32-bit and the same from tile to tile; only a scalar moves.
        shift = tl.cast(first, tl.int64) * stride_t
        offsets = rows * stride_t
    return shift, offsets


@triton.jit
def load_row_values(base_ptr, first, rows, stride_t, inside, other, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """One number for each row of a tile, as float32: [BLOCK]."""
    shift, offsets = tile_offsets(first, rows, stride_t, INDEXED)
    if PARTIAL:
        values = tl.load(base_ptr + shift + offsets, mask=inside, other=other)
    else:
        values = tl.load(base_ptr + shift + offsets)
    return values.to(tl.float32)


@triton.jit
def store_row_values(base_ptr, first, rows, stride_t, inside, values, INDEXED: tl.constexpr):
    """Write one number for each row of a tile that lies inside the sequence."""
    shift, offsets = tile_offsets(first, rows, stride_t, INDEXED)
    tl.store(base_ptr + shift + offsets, values, mask=inside)


@triton.jit
def tile_pointers(base_ptr, first, rows, stride_t, BLOCK_D: tl.constexpr, INDEXED: tl.constexpr):
    """Pointers to the elements of a tile: [BLOCK, BLOCK_D]."""
    shift, offsets = tile_offsets(first, rows, stride_t, INDEXED)
    return base_ptr + shift + (offsets[:, None] + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_rows(
    base_ptr,
    first,
    rows,
    stride_t,
    inside,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INDEXED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Rows of a tile, [BLOCK, BLOCK_D]; rows past the end and padded columns are 0 and never read."""
    pointers = tile_pointers(base_ptr, first, rows, stride_t, BLOCK_D, INDEXED)
    # [1, BLOCK_D]
    in_width = tl.arange(0, BLOCK_D)[None, :] < HEAD_WIDTH
    if PARTIAL and HEAD_WIDTH < BLOCK_D:
        tile = tl.load(pointers, mask=inside[:, None] & in_width, other=0.0)
    elif PARTIAL:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif HEAD_WIDTH < BLOCK_D:
        tile = tl.load(pointers, mask=in_width, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    base_ptr,
    first,
    rows,
    stride_t,
    inside,
    values,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Write the rows of a tile that lie inside the sequence, in the tensor's dtype."""
    pointers = tile_pointers(base_ptr, first, rows, stride_t, BLOCK_D, INDEXED)
    mask = inside[:, None]
    if HEAD_WIDTH < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_WIDTH)
    tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_update(qk, maximum, total, scale_log2, bias_log2, inside, HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr):
    """One step of the online softmax: p [M, N], the factor of what went before [M], the new maximum and sum [M]."""
    if HAS_BIAS or PARTIAL:
        scores = qk * scale_log2
        if HAS_BIAS:
            scores += bias_log2[None, :]
        if PARTIAL:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        maximum_new = tl.maximum(maximum, tl.max(scores, 1))
        peak = maximum_new
        if HAS_BIAS:
            # A bias of −inf may leave a row without a score so far: −inf − (−inf) would be NaN.
            peak = tl.where(maximum_new == float("-inf"), 0.0, maximum_new)
        p = tl.exp2(scores - peak[:, None])
    else:
        # The scale is positive, so it commutes with the maximum, and scaling and subtracting are one FMA.
        maximum_new = tl.maximum(maximum, tl.max(qk, 1) * scale_log2)
        peak = maximum_new
        p = tl.exp2(qk * scale_log2 - peak[:, None])
    factor = tl.exp2(maximum - peak)
    return p, factor, maximum_new, total * factor + tl.sum(p, 1)


@triton.jit
def attend_keys(
    out,
    maximum,
    total,
    q,
    k_base_ptr,
    v_base_ptr,
    bias_base_ptr,
    k_index_ptr,
    k_start,
    k_begin,
    k_end,
    scale_log2,
    stride_kt,
    stride_vt,
    stride_bt,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_K: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Attend to the keys ``k_begin`` to ``k_end`` of a sequence; ``PARTIAL`` when they do not fill their tiles."""
    for first in tl.range(k_begin, k_end, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < k_end
        rows = tile_rows(k_index_ptr, k_start, first, inside, BLOCK_N, INDEX_K, PARTIAL)
        # [N, D]
        k = load_rows(k_base_ptr, first, rows, stride_kt, inside, HEAD_WIDTH, BLOCK_D, INDEX_K, PARTIAL)
        bias_log2 = 0.0
        if HAS_BIAS:
            bias = load_row_values(bias_base_ptr, first, rows, stride_bt, inside, 0.0, INDEX_K, PARTIAL)
            bias_log2 = bias * LOG2_E
        # [M, N]
        qk = dot(q, tl.trans(k))
        p, factor, maximum, total = softmax_update(qk, maximum, total, scale_log2, bias_log2, inside, HAS_BIAS, PARTIAL)
        # [N, D]
        v = load_rows(v_base_ptr, first, rows, stride_vt, inside, HEAD_WIDTH, BLOCK_D, INDEX_K, PARTIAL)
        out = dot_add(p.to(v.dtype), v, out * factor[:, None])
    return out, maximum, total
