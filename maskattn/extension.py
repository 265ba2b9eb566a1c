"""The C++ extension ``maskattn._native``, loaded once and run on torch's own threads, and tensors as its arguments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["array_of", "extension", "has_extension"]

_DTYPES = {
    dtype: np.dtype(kind).str
    for dtype, kind in (
        (torch.float32, "float32"),
        (torch.bfloat16, "uint16"),
        (torch.int64, "int64"),
        (torch.int32, "int32"),
        (torch.bool, "bool"),
        (torch.uint8, "uint8"),
    )
}


@functools.cache
def extension() -> Any:
    """Load the extension; its kernels run on torch's OpenMP threads if their library is found.

    Raises:
        ImportError: the extension was not built.
    """
    import maskattn._native

    # Torch's OpenMP threads spin after each of its operations; separate threads would compete with them for the cores.
    for folder in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            if maskattn._native.share_team(str(library)):
                return maskattn._native
    return maskattn._native


@functools.cache
def has_extension() -> bool:
    """Return whether the extension was built and can be loaded."""
    try:
        extension()
    except ImportError:
        return False
    return True


def array_of(x: Tensor) -> np.ndarray:
    """Return a tensor's memory as an array, bfloat16 as uint16, for as long as the array lives.

    ``Tensor.numpy`` would forbid that the tensor is ever resized again.

    Raises:
        RuntimeError: the tensor has no memory, as one of ``torch.func`` or of a trace.
    """
    if x.numel() == 0:
        return np.empty(x.shape, _DTYPES[x.dtype])
    return np.asarray(_Memory(x.resolve_neg()))


class _Memory:
    """The memory of a tensor, by numpy's protocol; it keeps the tensor."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, x: Tensor) -> None:
        item = x.element_size()
        self._tensor = x
        self.__array_interface__ = {
            "version": 3,
            "typestr": _DTYPES[x.dtype],
            "shape": tuple(x.shape),
            "strides": None if x.is_contiguous() else tuple([item * stride for stride in x.stride()]),
            "data": (x.data_ptr(), False),
        }
