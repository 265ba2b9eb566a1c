"""Imports without Python's cyclic garbage collector.

A command imports half a million objects that live as long as its process, which the collector would visit again and
again: in vain, for a tenth of a second or two at the start of a command with torch, and three tenths at its end.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["imports"]


@contextmanager
def imports() -> Iterator[None]:
    """Suspend the collector within the context; what is imported there is never visited by it, nor at the end."""
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
