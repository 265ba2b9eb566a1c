"""Tiles of rows in one or two chunks, each a power of two wide, so that a head width of 80 costs 64 + 16, not 128.

A tile [BLOCK, D] is a tuple of its chunks. Its source is a pointer to the sequence's first row, or, if ``DESCRIBED``,
one descriptor for each chunk, bounded by the end of the sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.tiles import dot, dot_add, load_rows, store_rows

__all__ = [
    "add_weighted_rows",
    "describe_chunks",
    "dot_rows",
    "load_chunks",
    "scale_chunks",
    "store_chunks",
    "sum_of_products",
    "zeros_chunks",
]


@triton.jit
def describe_chunks(base_ptr, length, stride_t, WIDTH, BLOCK: tl.constexpr):
    """Make the descriptors of the rows of one sequence and head, for tiles of BLOCK rows."""
    # A descriptor may not be empty.
    bound = tl.maximum(length, 1)
    first = tl.make_tensor_descriptor(base_ptr, [bound, WIDTH.HEAD], [stride_t, 1], [BLOCK, WIDTH.FIRST])
    return (first, describe_second(base_ptr, bound, stride_t, WIDTH, BLOCK)) if WIDTH.SECOND else (first,)


@triton.jit
def describe_second(base_ptr, bound, stride_t, WIDTH, BLOCK: tl.constexpr):
    """Make the descriptor of the second chunk."""
    return tl.make_tensor_descriptor(
        base_ptr + WIDTH.FIRST, [bound, WIDTH.HEAD - WIDTH.FIRST], [stride_t, 1], [BLOCK, WIDTH.SECOND]
    )


@triton.jit
def load_chunks(
    source,
    first,
    rows,
    stride_t,
    inside,
    WIDTH,
    INDEXED: tl.constexpr,
    PARTIAL: tl.constexpr,
    DESCRIBED: tl.constexpr = False,
):
    """Load the rows of a tile; rows past the end and padded columns are 0 and never read."""
    one = load_chunk(source, 0, first, rows, stride_t, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
    return (
        (one, load_chunk(source, 1, first, rows, stride_t, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED))
        if WIDTH.SECOND
        else (one,)
    )


@triton.jit
def load_chunk(
    source,
    CHUNK: tl.constexpr,
    first,
    rows,
    stride_t,
    inside,
    WIDTH,
    INDEXED: tl.constexpr,
    PARTIAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Load one chunk of a tile."""
    if DESCRIBED:
        tile = source[CHUNK].load([first, 0])
    elif CHUNK == 1:
        rest: tl.constexpr = WIDTH.HEAD - WIDTH.FIRST
        tile = load_rows(source + WIDTH.FIRST, first, rows, stride_t, inside, rest, WIDTH.SECOND, INDEXED, PARTIAL)
    else:
        columns: tl.constexpr = WIDTH.FIRST if WIDTH.SECOND else WIDTH.HEAD
        tile = load_rows(source, first, rows, stride_t, inside, columns, WIDTH.FIRST, INDEXED, PARTIAL)
    return tile


@triton.jit
def store_chunks(base_ptr, first, rows, stride_t, inside, chunks, factor, WIDTH, INDEXED: tl.constexpr):
    """Write the rows of a tile that lie inside the sequence, times ``factor``, in the tensor's dtype."""
    if WIDTH.SECOND:
        store_rows(base_ptr, first, rows, stride_t, inside, chunks[0] * factor, WIDTH.FIRST, WIDTH.FIRST, INDEXED)
        store_rows(
            base_ptr + WIDTH.FIRST, first, rows, stride_t, inside, chunks[1] * factor, WIDTH.HEAD - WIDTH.FIRST,
            WIDTH.SECOND, INDEXED,
        )  # fmt: skip
    else:
        store_rows(base_ptr, first, rows, stride_t, inside, chunks[0] * factor, WIDTH.HEAD, WIDTH.FIRST, INDEXED)


@triton.jit
def zeros_chunks(WIDTH, BLOCK: tl.constexpr):
    """Return a tile of zeros, float32."""
    first = tl.zeros([BLOCK, WIDTH.FIRST], tl.float32)
    return (first, tl.zeros([BLOCK, WIDTH.SECOND], tl.float32)) if WIDTH.SECOND else (first,)


@triton.jit
def scale_chunks(chunks, factor, WIDTH):
    """Multiply each chunk by a factor."""
    return (chunks[0] * factor, chunks[1] * factor) if WIDTH.SECOND else (chunks[0] * factor,)


@triton.jit
def dot_rows(a, b, WIDTH):
    """Return the products of the rows of a with those of b, [rows of a, rows of b]."""
    product = dot(a[0], tl.trans(b[0]), WIDTH.PRECISION)
    if WIDTH.SECOND:
        product = dot_add(a[1], tl.trans(b[1]), product, WIDTH.PRECISION)
    return product


@triton.jit
def add_weighted_rows(weights, rows, total, WIDTH):
    """Return total + weights @ rows, with the weights rounded to the dtype of the rows."""
    rounded = weights.to(rows[0].dtype)
    first = dot_add(rounded, rows[0], total[0], WIDTH.PRECISION)
    return (first, dot_add(rounded, rows[1], total[1], WIDTH.PRECISION)) if WIDTH.SECOND else (first,)


@triton.jit
def sum_of_products(a, b, WIDTH):
    """Return Σ_d a·b for each row, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if WIDTH.SECOND:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total
