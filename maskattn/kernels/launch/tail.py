"""Rows that no program of an attention kernel comes to, or not surely: one more launch writes them.

A packed buffer may be longer than what it holds, as one of a fixed size is: rows beyond the last sequence become what a
row without keys has. And a sequence may be longer than ``max_seqlen`` says, which the host cannot know without waiting
for the device: its rows become NaN. Where nothing is to be written the launch reads the lengths and
returns; where the host has read them before, there is no launch.

Dimension key: B sequences, T rows of the buffer, C numbers of each.
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
    """A (T, C) view of a tensor and what its rows beyond the end become."""

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
    """Fill every ``step``-th row of each tensor up to ``end``, with its own number or NaN."""
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
    """Fill the rows beyond the last sequence and those of sequences beyond ``longest``."""
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
    """Fill the rows beyond the last sequence, and with NaN the rows of sequences that are longer than announced.

    Args:
        cu_seqlens: (B + 1,) int32 on the device, whose last entry is where the tail begins.
        max_seqlen: the length that the launches before this one went by.
        filled: tensors of as many rows, at the most three, and what these become. What follows the first axis has one
            stride, so that it is a view that is filled.
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
