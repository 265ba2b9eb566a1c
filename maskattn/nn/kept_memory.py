"""Memory of large results stays with the process while a model runs, instead of going back to the system each time.

glibc maps results of more than 32 MiB anew for every call: of an MLP's hidden features in ViT-B/16 and larger. The
system clears such pages when they are first written, which takes a twentieth of the time of an encoder on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

__all__ = ["keeping_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MIB = 1 << 20
# Larger than the hidden features of ViT-g's gated MLP for all rows of a product.
_LARGEST_KEPT, _MOST_FREE_KEPT = 128 * _MIB, 256 * _MIB
# What glibc comes to by itself in a process that has freed a result of 32 MiB.
_USUAL_LARGEST, _USUAL_FREE = 32 * _MIB, 64 * _MIB

_lock = threading.Lock()
_entered = 0


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Within the context, keep freed memory of up to 256 MiB for the next results; contexts may overlap.

    It has an effect with glibc alone, and there for the whole process.
    """
    global _entered
    libc = _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _entered += 1
        if _entered == 1:
            _set(libc, _LARGEST_KEPT, _MOST_FREE_KEPT)
    try:
        yield
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                _set(libc, _USUAL_LARGEST, _USUAL_FREE)
                libc.malloc_trim(0)


def _set(libc: Any, largest: int, most_free: int) -> None:
    libc.mallopt(_MMAP_THRESHOLD, largest)
    libc.mallopt(_TRIM_THRESHOLD, most_free)


@cache
def _glibc() -> Any:
    """Return the process's C library if it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    except (OSError, TypeError):  # TypeError: Windows
        return None
