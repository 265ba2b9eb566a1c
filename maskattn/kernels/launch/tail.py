"""An additional launch for the rows that the programs of an attention kernel may leave unwritten.

A packed buffer may be longer than its contents, for instance if its size is fixed; rows beyond the last sequence get
the values of a row without keys. A sequence may be longer than ``max_seqlen``, which the host cannot know without
synchronising with the device; its rows become NaN. If nothing is to be written, the launch only reads the lengths; if
the host has read them before, there is no launch.

Dimension key: B sequences, T rows of the buffer, C numbers of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from maskattn.derived import known_lengths
from maskattn.kernels.language.tiles import sequence_bounds
from maskattn.kernels.launch.arguments import VARYING, known_strides
from maskattn.kernels.launch.prepared import Launch, launch_prepared

__all__ = ["clear_tail", "clear_tail_kernel"]

PROGRAMS = 32
AT_ONCE = 3  # tensors of one launch
BLOCK = 256


class Cleared(NamedTuple):
    """A (T, C) view of a tensor, and the value of its rows beyond the end."""

    ptr: Any
    stride_t: Any
    stride_c: Any
    columns: Any
    fill: Any


@triton.jit
def fill_row(x, row, value, BLOCK: tl.constexpr):
    """Fill one row of a tensor."""
    for first in tl.range(0, x.columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.full([BLOCK], value, tl.float32).to(x.ptr.dtype.element_ty)
        tl.store(x.ptr + row * x.stride_t + column.to(tl.int64) * x.stride_c, values, mask=column < x.columns)


@triton.jit
def fill_rows(row, end, step, first, second, third, IS_NAN: tl.constexpr, BLOCK: tl.constexpr):
    """Fill every ``step``-th row of each tensor up to ``end`` with the tensor's value or NaN."""
    while row < end:
        fill_row(first, row, float("nan") if IS_NAN else first.fill, BLOCK)
        if second.ptr is not None:
            fill_row(second, row, float("nan") if IS_NAN else second.fill, BLOCK)
        if third.ptr is not None:
            fill_row(third, row, float("nan") if IS_NAN else third.fill, BLOCK)
        row += step


@triton.jit(do_not_specialize=VARYING)
def clear_tail_kernel(
    starts_ptr, batch, longest, rows, first_cleared, second_cleared, third_cleared, BLOCK: tl.constexpr
):
    """Fill the rows beyond the last sequence, and the rows of sequences longer than ``longest``."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tail = tl.load(starts_ptr + batch).to(tl.int64) + program
    fill_rows(tail, rows, programs, first_cleared, second_cleared, third_cleared, False, BLOCK)
    sequence = program
    while sequence < batch:
        start, length = sequence_bounds(starts_ptr, starts_ptr + 1, sequence)
        if length > longest:
            end = tl.minimum(start.to(tl.int64) + length, rows)
            fill_rows(start.to(tl.int64), end, 1, first_cleared, second_cleared, third_cleared, True, BLOCK)
        sequence += programs


def clear_tail(cu_seqlens: Tensor, max_seqlen: int, *filled: tuple[Tensor, float]) -> None:
    """Fill the rows beyond the last sequence, and with NaN the rows of sequences that are longer than ``max_seqlen``.

    Args:
        cu_seqlens: (B + 1,) int32 on the device; the rows from its last entry on are filled.
        max_seqlen: the greatest length that the preceding launches assumed.
        filled: up to three tensors with the same number of rows, each with the value of its filled rows. The axes after
            the first must have a common stride, so that they can be flattened in place.
    """
    rows = filled[0][0].shape[0]
    lengths = known_lengths(cu_seqlens)
    if lengths is not None and lengths[0] == rows and lengths[1] <= max_seqlen:
        return
    given = [(x.reshape(rows, -1), fill) for x, fill in filled if x.numel() > 0]
    if not given:
        return
    assert len(given) <= AT_ONCE
    batch = cu_seqlens.shape[0] - 1

    def make() -> Launch:
        strides = [known_strides(*x.stride()) for x, _ in given]
        cleared = [Cleared(x, s[0], s[1], x.shape[1], fill) for (x, fill), s in zip(given, strides, strict=True)]
        cleared += [Cleared(None, 0, 0, 0, 0.0)] * (AT_ONCE - len(cleared))
        arguments = cu_seqlens, batch, max_seqlen, rows, *cleared
        return Launch(clear_tail_kernel, min(rows, PROGRAMS), False, arguments, {"BLOCK": BLOCK, "num_warps": 4})

    known = clear_tail_kernel, batch, max_seqlen, rows, *((x.shape[1], fill) for x, fill in given)
    launch_prepared(known, (cu_seqlens, *(x for x, _ in given)), make, cu_seqlens)
