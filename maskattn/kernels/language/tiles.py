"""Device functions that the attention kernels share: a program's position, tiles of rows, and the dot product.

Sequence b of the queries, or of the keys, has the positions start to end. Without an index a position is the row itself
(packed and dense tensors); with one (``INDEXED``) the row is looked up, so that the kept tokens of a dense tensor are
read in place.

Dimension key: M queries of a tile, N keys of a tile, D head width (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.bundles import Tokens

__all__ = [
    "INTERPRETING",
    "LN_2",
    "LOG2_E",
    "aligned",
    "dot",
    "dot_add",
    "load_row_values",
    "load_rows",
    "positions_base",
    "program_position",
    "row_values_base",
    "sequence_base",
    "sequence_bounds",
    "store_row_values",
    "store_rows",
    "tile_offsets",
    "tile_rows",
    "tokens_base",
]

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = "ieee"):
    """Return a @ b in float32; float32 operands stay float32, or become three products of TF32 with "tf32x3"."""
    if INTERPRETING and a.dtype == tl.bfloat16:
        # The interpreter multiplies bfloat16 operands as raw integers; their products are exact in float32.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, total, PRECISION: tl.constexpr):
    """Return total + a @ b, summed in the accumulator of the tensor core."""
    if INTERPRETING and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def program_position(tiles, heads):
    """Return this program's tile, head and sequence; neighbours share a head, so that its keys stay in the cache."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // tiles // heads


@triton.jit
def sequence_bounds(starts_ptr, ends_ptr, sequence):
    """Return the first position and the length of a sequence."""
    start = tl.load(starts_ptr + sequence)
    return start, tl.load(ends_ptr + sequence) - start


@triton.jit
def sequence_base(ptr, sequence, head, start, stride_b, stride_h, stride_t, INDEXED: tl.constexpr):
    """Return the pointer from which the rows of a sequence and head are counted."""
    # 64-bit products: T·H·D passes 2^31 on large slides.
    base = ptr + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    if not INDEXED:
        base += start.to(tl.int64) * stride_t
    return base


@triton.jit
def aligned(tokens):
    """Return the tensor with strides that the compiler knows to be multiples of ``tokens.multiple``.

    Without this knowledge it reads rows of a head width such as 72, which could begin anywhere, element by element.
    """
    if tokens.multiple is not None:
        tokens = Tokens(
            tokens.ptr,
            tokens.stride_b // tokens.multiple * tokens.multiple,
            tokens.stride_h // tokens.multiple * tokens.multiple,
            tokens.stride_t // tokens.multiple * tokens.multiple,
            tokens.multiple,
        )
    return tokens


@triton.jit
def tokens_base(tokens, sequence, head, start, INDEXED: tl.constexpr):
    """Return the pointer to the first row of a sequence and head of ``Tokens``."""
    return sequence_base(tokens.ptr, sequence, head, start, tokens.stride_b, tokens.stride_h, tokens.stride_t, INDEXED)


@triton.jit
def row_values_base(values, sequence, head, start, INDEXED: tl.constexpr):
    """Return the pointer to the first number of a sequence and head of ``RowValues``."""
    return sequence_base(values.ptr, sequence, head, start, values.stride_b, values.stride_h, 1, INDEXED)


@triton.jit
def positions_base(positions, sequence, start, INDEXED: tl.constexpr):
    """Return the pointer to the first position of a sequence of ``Positions``."""
    return sequence_base(positions.ptr, sequence, sequence, start, positions.stride_b, 0, positions.stride_t, INDEXED)


@triton.jit
def tile_rows(index_ptr, start, first, inside, BLOCK: tl.constexpr, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """Return the rows of a tile, [BLOCK]: looked up, or offsets from ``first``."""
    # [BLOCK]
    rows = tl.arange(0, BLOCK)
    if INDEXED and PARTIAL:
        rows = tl.load(index_ptr + start + first + rows, mask=inside, other=0)
    elif INDEXED:
        rows = tl.load(index_ptr + start + first + rows)
    return rows


@triton.jit
def tile_offsets(first, rows, stride_t, INDEXED: tl.constexpr):
    """Return the element offsets of a tile's rows as a 64-bit scalar and [BLOCK], which are to be added."""
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
    """Load one number for each row of a tile, as float32: [BLOCK]."""
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
    """Return the pointers to the elements of a tile, [BLOCK, BLOCK_D]."""
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
    """Load the rows of a tile, [BLOCK, BLOCK_D]; rows past the end and padded columns are 0 and never read."""
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
