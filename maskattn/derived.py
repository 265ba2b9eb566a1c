"""A cache of values derived from the contents of a tensor, valid while these do not change.

Every layer reads the lengths of a batch, and the schedule that a launch derives from them, or their sum as known to the
host, is the same for all layers. Such values are cached outside the tensor and discarded when the tensor is freed, has
been written to, or refers to other memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from maskattn.transforms import is_transformed

__all__ = ["derived", "known_lengths", "note_lengths"]


class _Kept:
    """The cached values of one tensor, and the version and address for which they are valid."""

    __slots__ = ("address", "found", "of", "version")

    def __init__(self, x: Tensor) -> None:
        self.of = weakref.ref(x)
        self.begin(x)

    def begin(self, x: Tensor) -> None:
        """Start an empty cache for the tensor's present contents."""
        self.version, self.address = x._version, x.data_ptr()
        self.found: dict[Any, Any] = {}


_KEPT: dict[int, _Kept] = {}

# Largest number of cached values of one tensor; beyond it, its cache is cleared.
MOST = 64


def derived(x: Tensor) -> dict[Any, Any] | None:
    """Return the cache of a tensor, a dictionary; None if changes of its contents cannot be detected.

    That is the case in inference mode, whose tensors have no version counter, while a CUDA graph is captured, which is
    replayed with other contents, under ``torch.compile`` and under ``torch.func``. Writes by the replay of a graph or
    by a custom kernel are not detected: outside the graph, pass a new tensor.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    kept = _KEPT.get(id(x))
    if kept is None or kept.of() is not x:
        # A tensor that has a cache is none of these.
        if type(x) is not Tensor or x.is_inference() or is_transformed((x,)):
            return None
        kept = _KEPT[id(x)] = _Kept(x)
        weakref.finalize(x, _forget, id(x), kept).atexit = False
    elif kept.version != x._version or kept.address != x.data_ptr():
        kept.begin(x)
    elif len(kept.found) > MOST:
        kept.found.clear()
    return kept.found


def _forget(key: int, kept: _Kept) -> None:
    # Another tensor may have the same id by now.
    if _KEPT.get(key) is kept:
        del _KEPT[key]


def note_lengths(cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Cache what the host knows of a tensor of lengths: their sum, which is its last entry, and the longest."""
    found = derived(cu_seqlens)
    if found is not None:
        found["lengths"] = total, longest


def known_lengths(cu_seqlens: Tensor) -> tuple[int, int] | None:
    """Return (total, longest) as cached by :func:`note_lengths`; None if unknown or no longer valid."""
    found = derived(cu_seqlens)
    return None if found is None else found.get("lengths")
