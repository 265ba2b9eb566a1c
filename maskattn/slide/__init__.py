"""Slides: reading, tissue, token grids, the stream of tiles, the pipeline and its outputs.

Level-0 pixels (``_lv0``) are the one coordinate system of all modules; spacing (``spacing_um``) is µm per pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskattn.slide.report import show

__all__ = ["show"]


def __getattr__(name: str) -> Any:
    # Drawing needs more than most of what is imported from here does.
    if name == "show":
        from maskattn.slide.report import show

        return show
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
