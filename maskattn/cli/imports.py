"""Imports without Python's cyclic garbage collector, and without a search for the module of each registration.

A command imports half a million objects that live as long as its process, which the collector would visit again and
again: in vain, for a tenth of a second or two at the start of a command with torch, and three tenths at its end.

``torch.library`` asks :mod:`inspect` for the module of every function that registers an operation, torch's own and
ours. The answer is found by comparing the files of all modules, a thousand at the time, whose real paths are looked up
for it. A frame's globals name its module.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

__all__ = ["imports"]


@contextmanager
def imports() -> Iterator[None]:
    """Suspend the collector within the context; what is imported there is never visited by it, nor at the end.

    Within the context, ``inspect.getmodule`` finds the module of a frame by its globals.
    """
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    search = inspect.getmodule
    gc.disable()
    inspect.getmodule = _by_globals(search)
    try:
        yield
    finally:
        inspect.getmodule = search
        if len(sys.modules) > modules:
            gc.freeze()
        if was_enabled:
            gc.enable()


def _by_globals(search: Callable[..., ModuleType | None]) -> Callable[..., ModuleType | None]:
    """Return ``inspect.getmodule`` with a short cut for frames, which leads to the same module or is not taken."""

    def getmodule(object: Any, _filename: str | None = None) -> ModuleType | None:
        if isinstance(object, FrameType):
            known = object.f_globals
            module = sys.modules.get(known.get("__name__", ""))
            if module is not None and vars(module) is known and known.get("__file__") == object.f_code.co_filename:
                return module
        return search(object, _filename)

    return getmodule
