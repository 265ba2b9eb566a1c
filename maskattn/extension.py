"""The C++ extension ``maskattn._native``, loaded once and run on torch's own threads, and tensors as its arguments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # it is documented there

__all__ = ["argument_of", "extension", "has_extension"]


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


def argument_of(x: Tensor) -> Any:
    """Return a tensor as an argument of the extension, which reads and writes its memory without a copy.

    It is a DLPack capsule, which keeps the tensor as long as it lives. ``Tensor.numpy`` takes several times as long and
    would forbid that the tensor is ever resized again.

    Raises:
        RuntimeError: the tensor has no memory, as one of ``torch.func`` or of a trace.
        BufferError: its device has none that could be handed over.
    """
    return to_dlpack(x.resolve_neg())
