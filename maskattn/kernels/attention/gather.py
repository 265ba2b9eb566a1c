"""Rows by index: packing gathers the kept tokens' rows, unpacking puts them back and zeros between them.

Both use one kernel: row i of the result is row ``index[i]`` of the source, or zeros where the index is −1. Elements are
moved as integers of their size, so that every dtype is copied bit for bit.

Dimension key: T rows, C elements of a row, flattened.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.launch.arguments import VARYING
from maskattn.kernels.tables.lookup import capability_of

__all__ = ["gather_kernel", "gather_rows", "runs_on", "scatter_rows"]

# Bytes of a program's tile: each of its 128 threads has four loads of 16 bytes in flight.
TILE_BYTES = 8192
LARGEST_BLOCK = 1024

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(
    result_ptr,
    source_ptr,
    index_ptr,
    count,
    columns,
    stride_t,
    stride_c,
    column_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fill one tile of the result, (count, columns) contiguous."""
    program = tl.program_id(0)
    row = (program // column_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = program % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < count)[:, None] & (column < columns)[None, :]
    # 64-bit products: T·C passes 2^31 on large slides.
    source_row = tl.load(index_ptr + row, mask=row < count, other=-1).to(tl.int64)
    pointers = source_ptr + source_row[:, None] * stride_t + column.to(tl.int64)[None, :] * stride_c
    values = tl.load(pointers, mask=inside & (source_row >= 0)[:, None], other=0)
    tl.store(result_ptr + row[:, None] * columns + column[None, :], values, mask=inside)


def runs_on(device: torch.device) -> bool:
    """Return whether the kernel can run on this device."""
    if triton.knobs.runtime.interpret:
        return True
    return device.type == "cuda" and (torch.version.hip is not None or capability_of(device) >= (8, 0))


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of ``x`` at ``indices``; other rows are not read.

    Args:
        x: (rows, ...), any dtype and strides; copied only if the axes after the first cannot be flattened in place.
        indices: (T,) int64, each at least 0 and less than the number of rows.

    Returns:
        (T, ...), contiguous.
    """
    return _gather(x, indices)


def scatter_rows(rows: Tensor, row_of_token: Tensor) -> Tensor:
    """Put rows at the positions of their tokens, with zeros elsewhere.

    Args:
        rows: (T, ...), any dtype and strides.
        row_of_token: (B·N,) int32, the row of each token, −1 for tokens without one.

    Returns:
        (B·N, ...), contiguous.
    """
    return _gather(rows, row_of_token)


def _gather(source: Tensor, index: Tensor) -> Tensor:
    """Return rows of which row i is row ``index[i]`` of the source, or zeros."""
    if source.is_complex():
        # No integer type has sixteen bytes.
        return torch.view_as_complex(_gather(torch.view_as_real(source.resolve_conj()), index))
    shape = (index.shape[0], *source.shape[1:])
    result = torch.empty(shape, dtype=source.dtype, device=source.device)
    if result.numel() == 0 or source.numel() == 0:
        return result.zero_()
    integers = INTEGERS[source.element_size()]
    source_TC = source.resolve_neg().view(integers).reshape(source.shape[0], -1)
    columns = source_TC.shape[1]
    block_c = min(triton.next_power_of_2(columns), LARGEST_BLOCK)
    block_t = triton.next_power_of_2(max(1, TILE_BYTES // (block_c * source.element_size())))
    column_tiles = triton.cdiv(columns, block_c)
    with torch.cuda.device_of(source):
        gather_kernel[(triton.cdiv(shape[0], block_t) * column_tiles,)](
            result.view(integers), source_TC, index, shape[0], columns, *source_TC.stride(), column_tiles,
            BLOCK_T=block_t, BLOCK_C=block_c,
        )  # fmt: skip
    return result
