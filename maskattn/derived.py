"""What follows from the numbers of a tensor, kept for as long as they are the same.

The lengths of a batch are read by every layer, and what a launch makes of them (a schedule) or the host knows of them
(their sum) is the same for all layers. It is kept beside the tensor, not in it, and forgotten with it: when the tensor
is gone, was written to, or has other memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from maskattn.transforms import is_transformed

__all__ = ["derived", "known_lengths", "note_lengths"]


class _Kept:
    """What is kept of one tensor, and what it must still be for that to hold."""

    __slots__ = ("address", "found", "of", "version")

    def __init__(self, x: Tensor) -> None:
        self.of = weakref.ref(x)
        self.begin(x)

    def begin(self, x: Tensor) -> None:
        """Know nothing yet of the numbers that the tensor has now."""
        self.version, self.address = x._version, x.data_ptr()
        self.found: dict[Any, Any] = {}


_KEPT: dict[int, _Kept] = {}

# Of one tensor; with more, such as schedules beside the lengths of many others, it begins anew.
MOST = 64


def derived(x: Tensor) -> dict[Any, Any] | None:
    """A dictionary that is the tensor's while its numbers stay; None where nobody could tell that they do.

    That is in inference mode, whose tensors do not count what is written to them, while a CUDA graph is captured, which
    is replayed with other numbers, and under ``torch.func``. What a graph's replay, or a kernel of one's own, writes to
    a tensor is not counted either: whoever calls with it outside of the graph needs a new tensor.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_inference() or is_transformed((x,)):
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    kept = _KEPT.get(id(x))
    if kept is None or kept.of() is not x:
        kept = _KEPT[id(x)] = _Kept(x)
        weakref.finalize(x, _forget, id(x), kept).atexit = False
    elif kept.version != x._version or kept.address != x.data_ptr():
        kept.begin(x)
    elif len(kept.found) > MOST:
        kept.found.clear()
    return kept.found


def _forget(key: int, kept: _Kept) -> None:
    # Another tensor may have the number by now.
    if _KEPT.get(key) is kept:
        del _KEPT[key]


def note_lengths(cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Note what the host has read of a tensor of lengths: their sum, which is its last entry, and the longest."""
    found = derived(cu_seqlens)
    if found is not None:
        found["lengths"] = total, longest


def known_lengths(cu_seqlens: Tensor) -> tuple[int, int] | None:
    """What :func:`note_lengths` noted, where it still holds."""
    found = derived(cu_seqlens)
    return None if found is None else found.get("lengths")
