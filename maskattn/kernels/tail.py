"""Rows beyond the last sequence: a packed buffer may be longer than what it holds, as one of a fixed size is.

No program of an attention kernel comes to them. One more launch writes what a row without keys has; where the sequences
end with the buffer, it reads one number and returns.

Dimension key: T rows of the buffer, C numbers of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.arguments import known_strides

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
def clear_row(x, row, BLOCK: tl.constexpr):
    """Fill one row."""
    for first in tl.range(0, x.columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.full([BLOCK], x.fill, tl.float32).to(x.ptr.dtype.element_ty)
        tl.store(x.ptr + row * x.stride_t + column.to(tl.int64) * x.stride_c, values, mask=column < x.columns)


@triton.jit(do_not_specialize=["rows"])
def clear_tail_kernel(end_ptr, rows, first, second, third, BLOCK: tl.constexpr):
    """Fill the rows from the number at ``end_ptr`` on, each program every so many."""
    row = tl.load(end_ptr).to(tl.int64) + tl.program_id(0)
    while row < rows:
        clear_row(first, row, BLOCK)
        if second.ptr is not None:
            clear_row(second, row, BLOCK)
        if third.ptr is not None:
            clear_row(third, row, BLOCK)
        row += tl.num_programs(0)


def clear_tail(cu_seqlens: Tensor, *filled: tuple[Tensor, float]) -> None:
    """Fill the rows beyond the last sequence.

    Args:
        cu_seqlens: (B + 1,) int32 on the device, whose last entry is where the tail begins.
        filled: tensors of as many rows, at the most three, and what these become. What follows the first axis has one
            stride, so that it is a view that is filled.
    """
    rows = filled[0][0].shape[0]
    given = [(x.reshape(rows, -1), fill) for x, fill in filled if x.numel() > 0]
    if not given:
        return
    assert len(given) <= AT_ONCE
    strides = [known_strides(*x.stride()) for x, _ in given]
    cleared = [Cleared(x, s[0], s[1], x.shape[1], fill) for (x, fill), s in zip(given, strides, strict=True)]
    cleared += [Cleared(None, 0, 0, 0, 0.0)] * (AT_ONCE - len(cleared))
    with torch.cuda.device_of(cu_seqlens):
        clear_tail_kernel[(min(rows, PROGRAMS),)](cu_seqlens[-1:], rows, *cleared, BLOCK=BLOCK, num_warps=4)
