"""Importing this lets timm be imported beside a torchvision that was built for another torch, when it is.

Unlike ``without_torchvision.py``, this imports nothing itself, so that a command starts as it does without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _NamesOperators:
    """A finder that finds nothing; it names torchvision's operators just before torchvision is found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            import bench.without_torchvision  # noqa: F401 -- for its effect
        return None


sys.meta_path.insert(0, _NamesOperators())
