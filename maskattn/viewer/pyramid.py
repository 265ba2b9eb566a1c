"""The pyramid of a deep-zoom image: levels that double in size, divided into squares.

Level 0 is a single pixel and the last level has the slide's own pixels, as in the Deep Zoom format and OpenSlide's
``DeepZoomGenerator``. That class reads only through OpenSlide and loads a complete level into memory if a slide has no
coarser one. :class:`maskattn.slide.reader.SlideReader` reads every format of this package in bounded memory and
tolerates damage, so only the geometry is that of Deep Zoom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TILE_PX", "Pyramid", "Square"]

TILE_PX = 256


@dataclass(frozen=True)
class Square:
    """A square of a level: less than :data:`TILE_PX` wide or high at the slide's edges.

    Attributes:
        x_px: its left edge, in pixels of the level.
        y_px: its top edge, in pixels of the level.
        width_px: its width within the level.
        height_px: its height within the level.
        lv0_per_px: level-0 pixels per pixel of the level.
    """

    x_px: int
    y_px: int
    width_px: int
    height_px: int
    lv0_per_px: int


@dataclass(frozen=True)
class Pyramid:
    """The levels of a slide.

    Attributes:
        width_px: width of the slide's level 0.
        height_px: height of the slide's level 0.
    """

    width_px: int
    height_px: int

    @property
    def levels(self) -> int:
        """The number of levels; the finest is the last."""
        return math.ceil(math.log2(max(self.width_px, self.height_px))) + 1

    def size_of(self, level: int) -> tuple[int, int]:
        """Return the width and height of a level in its own pixels."""
        shrink = 1 << (self.levels - 1 - level)
        return -(-self.width_px // shrink), -(-self.height_px // shrink)

    def square(self, level: int, column: int, row: int) -> Square:
        """Return one square.

        Raises:
            IndexError: there is no such level or square.
        """
        if not 0 <= level < self.levels:
            raise IndexError(f"a level must be 0 to {self.levels - 1}, got {level}")
        width, height = self.size_of(level)
        x, y = column * TILE_PX, row * TILE_PX
        if not (0 <= x < width and 0 <= y < height):
            raise IndexError(f"a square must be within the slide, got column {column} and row {row} of level {level}")
        return Square(x, y, min(TILE_PX, width - x), min(TILE_PX, height - y), 1 << (self.levels - 1 - level))
