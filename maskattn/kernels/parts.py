"""Tiles of rows in one or two parts, each a power of two wide, so that a head width of 80 costs 64 + 16 and not 128.

A tile [BLOCK, D] is a tuple of its parts. Its source is a pointer to the sequence's first row, or (``DESCRIBED``) one
descriptor for each part, whose bound is the end of the sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.tiles import dot, dot_add, load_rows, store_rows


@triton.jit
def describe_parts(base_ptr, length, stride_t, WIDTH, BLOCK: tl.constexpr):
    """Descriptors of the rows of one sequence and head, for tiles of BLOCK rows."""
    # A descriptor may not be empty.
    bound = tl.maximum(length, 1)
    first = tl.make_tensor_descriptor(base_ptr, [bound, WIDTH.HEAD], [stride_t, 1], [BLOCK, WIDTH.FIRST])
    if WIDTH.SECOND:
        second = tl.make_tensor_descriptor(
            base_ptr + WIDTH.FIRST, [bound, WIDTH.HEAD - WIDTH.FIRST], [stride_t, 1], [BLOCK, WIDTH.SECOND]
        )
        source = (first, second)
    else:
        source = (first,)
    return source


@triton.jit
def load_parts(
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
    """Rows of a tile; rows past the end and padded columns are 0 and never read."""
    if DESCRIBED:
        one = source[0].load([first, 0])
    elif WIDTH.SECOND:
        one = load_rows(source, first, rows, stride_t, inside, WIDTH.FIRST, WIDTH.FIRST, INDEXED, PARTIAL)
    else:
        one = load_rows(source, first, rows, stride_t, inside, WIDTH.HEAD, WIDTH.FIRST, INDEXED, PARTIAL)
    if WIDTH.SECOND:
        if DESCRIBED:
            two = source[1].load([first, 0])
        else:
            two = load_rows(
                source + WIDTH.FIRST,
                first,
                rows,
                stride_t,
                inside,
                WIDTH.HEAD - WIDTH.FIRST,
                WIDTH.SECOND,
                INDEXED,
                PARTIAL,
            )
        parts = (one, two)
    else:
        parts = (one,)
    return parts


@triton.jit
def store_parts(base_ptr, first, rows, stride_t, inside, parts, factor, WIDTH, INDEXED: tl.constexpr):
    """Write the rows of a tile that lie inside the sequence, times ``factor``, in the tensor's dtype."""
    if WIDTH.SECOND:
        store_rows(base_ptr, first, rows, stride_t, inside, parts[0] * factor, WIDTH.FIRST, WIDTH.FIRST, INDEXED)
        store_rows(
            base_ptr + WIDTH.FIRST, first, rows, stride_t, inside, parts[1] * factor, WIDTH.HEAD - WIDTH.FIRST,
            WIDTH.SECOND, INDEXED,
        )  # fmt: skip
    else:
        store_rows(base_ptr, first, rows, stride_t, inside, parts[0] * factor, WIDTH.HEAD, WIDTH.FIRST, INDEXED)


@triton.jit
def zeros_parts(WIDTH, BLOCK: tl.constexpr):
    """A tile of zeros, float32."""
    if WIDTH.SECOND:
        parts = (tl.zeros([BLOCK, WIDTH.FIRST], tl.float32), tl.zeros([BLOCK, WIDTH.SECOND], tl.float32))
    else:
        parts = (tl.zeros([BLOCK, WIDTH.FIRST], tl.float32),)
    return parts


@triton.jit
def scale_parts(parts, factor, WIDTH):
    """Each part times a factor."""
    return (parts[0] * factor, parts[1] * factor) if WIDTH.SECOND else (parts[0] * factor,)


@triton.jit
def dot_rows(a, b, WIDTH):
    """Products of the rows of a with those of b, [rows of a, rows of b]."""
    product = dot(a[0], tl.trans(b[0]))
    if WIDTH.SECOND:
        product = dot_add(a[1], tl.trans(b[1]), product)
    return product


@triton.jit
def add_weighted_rows(weights, rows, total, WIDTH):
    """total + weights @ rows, the weights rounded to the dtype of the rows."""
    rounded = weights.to(rows[0].dtype)
    if WIDTH.SECOND:
        sums = (dot_add(rounded, rows[0], total[0]), dot_add(rounded, rows[1], total[1]))
    else:
        sums = (dot_add(rounded, rows[0], total[0]),)
    return sums


@triton.jit
def sum_of_products(a, b, WIDTH):
    """Σ_d a·b for each row, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if WIDTH.SECOND:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total
