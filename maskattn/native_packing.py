"""Packing on the CPU by the C++ extension: moving rows by index, and finding the kept tokens of a mask.

Rows are moved as bytes, so that every dtype is supported and copied bit for bit.

Dimension key: B sequences, N tokens of each, T packed tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from maskattn.extension import argument_of, extension

__all__ = ["gather_rows", "gathers", "kept_tokens", "scatter_rows", "scatters"]

# Below these limits torch's own functions are at least as fast: their calls cost less, and narrow rows cost them no
# branch each.
GATHER_BYTES = 1 << 25
SCATTER_ROWS = 128
ROW_BYTES = 256


def gathers(x: Tensor, count: int) -> bool:
    """Return whether :func:`gather_rows` supports ``x`` and is faster than torch's index_select for ``count`` rows."""
    if x.nbytes < GATHER_BYTES:
        return False
    row = _row_bytes(x)
    return row >= ROW_BYTES and row * count >= GATHER_BYTES and _has_whole_rows(x)


def scatters(rows: Tensor) -> bool:
    """Return whether :func:`scatter_rows` supports these rows and is faster than torch's zeros and index_copy."""
    return rows.shape[0] >= SCATTER_ROWS and _row_bytes(rows) >= ROW_BYTES and _has_whole_rows(rows)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Gather the rows of ``x`` (rows, ...) at ``indices`` (T,) int64 → (T, ...), contiguous; other rows are not read.

    Raises:
        ValueError: an index is out of range.
    """
    result = x.new_empty((indices.shape[0], *x.shape[1:]))
    _move(x, indices, result)
    return result


def scatter_rows(rows: Tensor, row_of_token: Tensor) -> Tensor:
    """Scatter rows (T, ...) to tokens (rows, ...): token i is row ``row_of_token[i]``, int32, or zeros if that is −1.

    Raises:
        ValueError: an entry is neither −1 nor the index of a row.
    """
    result = rows.new_empty((row_of_token.shape[0], *rows.shape[1:]))
    _move(rows, row_of_token, result)
    return result


def _move(source: Tensor, index: Tensor, result: Tensor) -> None:
    extension().move_rows(
        _bytes(source.resolve_conj().resolve_neg()),
        argument_of(index.contiguous()),
        _bytes(result),
        threads=torch.get_num_threads(),
    )


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _has_whole_rows(x: Tensor) -> bool:
    """Return whether each row is contiguous in CPU memory."""
    if x.device.type != "cpu" or x.layout != torch.strided:
        return False
    if x.is_contiguous():
        return True
    step = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _bytes(x: Tensor) -> Any:
    """Return the same memory as an argument (rows, bytes of a row) of uint8."""
    rows = x.detach()
    if not (x.is_contiguous() and x.stride(-1) == 1):
        rows = rows.as_strided((x.shape[0], math.prod(x.shape[1:])), (x.stride(0), 1))
    return argument_of(rows.view(torch.uint8).view(x.shape[0], _row_bytes(x)))


def kept_tokens(keep_BN: Tensor) -> tuple[Tensor, Tensor, int, Tensor] | None:
    """Compute the fields of a Packing: indices (T,), cu_seqlens (B + 1,), max_seqlen and row_of_token (B·N,).

    Returns None if the mask is not on the CPU, or is being traced, because a trace cannot record reads of its memory.
    """
    if keep_BN.device.type != "cpu" or type(keep_BN) is not Tensor or is_in_torch_dispatch_mode():
        return None
    try:
        keep = argument_of(keep_BN.contiguous())
    except RuntimeError:  # functorch's tensors have no memory
        return None
    indices, cu_seqlens, max_seqlen, row_of_token = extension().kept_tokens(keep)
    return torch.from_numpy(indices), torch.from_numpy(cu_seqlens), max_seqlen, torch.from_numpy(row_of_token)
