"""Memory of large results on the CPU, in huge pages where the system has them.

glibc maps each result of more than 32 MiB anew, and the system clears its pages one by one as they are first written,
4 KiB at a time unless it is asked for more: a quarter of the time of attention over short sequences and its gradient.
The memory goes back to the system with the result.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["empty_like"]

# Smaller results are mostly memory that the process has written before.
_LEAST_BYTES = 32 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor of the same shape, dtype and device."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = result.numel() * result.element_size()
    if size >= _LEAST_BYTES and result.device.type == "cpu" and type(result) is Tensor:
        madvise = _madvise()
        if madvise is not None:
            start = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            madvise(start, result.data_ptr() + size - start, _ADVICE)  # what refuses leaves all as it was
    return result


@cache
def _madvise() -> Any:
    """Return the system's function, or None if it knows no huge pages."""
    if _ADVICE is None:
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
