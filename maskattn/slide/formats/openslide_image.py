"""Slides that OpenSlide decodes.

OpenSlide takes a position in level-0 pixels and divides it by one number per level, the mean of the ratios of both
axes. This adapter multiplies by that number first, so that exactly the requested pixels of a level are read.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import openslide

from maskattn.shapes import UInt8
from maskattn.slide.formats.image import DecodeError, axis_downsamples
from maskattn.slide.formats.ome import ome_properties
from maskattn.slide.formats.remedies import said_by

__all__ = ["OpenSlideImage"]

# Decoded tiles are kept for neighbouring regions that share them: two or three rows of 256 px tiles across 50,000 px.
_CACHE_BYTES = 128 << 20
# Assumed where the format does not give the size of its tiles.
_COMMON_TILE_PX = 256
# OpenSlide decodes whole tiles, and aborts the process if there is no memory for one.
_MOST_TILE_PX = 64 << 20
# OpenSlide paints in squares of this size and rounds the corner of each down to a level-0 pixel.
_PAINTED_PX = 4096


class OpenSlideImage:
    """A slide open in OpenSlide; see :class:`maskattn.slide.formats.image.SlideImage`.

    Args:
        path: the slide file.

    Raises:
        openslide.OpenSlideError: OpenSlide cannot open it.
    """

    def __init__(self, path: Path) -> None:
        self._slide = openslide.OpenSlide(path)
        self._slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        self._single_downsamples: tuple[float, ...] = self._slide.level_downsamples
        self.level_dimensions: tuple[tuple[int, int], ...] = self._slide.level_dimensions
        self.level_downsamples = axis_downsamples(self.level_dimensions, self._single_downsamples)
        self.decoder = f"openslide {openslide.__library_version__}"
        self.properties = _properties(self._slide)
        self.vendor = self.properties.get("openslide.vendor")
        description = self.properties.get("tiff.ImageDescription")
        self.properties |= ome_properties(description)
        self.series: tuple[str, ...] = ()
        self.level_tiles = tuple(self._tile_of(level) for level in range(len(self.level_dimensions)))
        self.associated_images: tuple[str, ...] = tuple(sorted(self._slide.associated_images))

    @property
    def unshifted_levels(self) -> tuple[int, ...]:
        """The levels whose pixels OpenSlide shows as they lie in the file, and not moved by a part of a pixel."""
        return tuple(i for i, single in enumerate(self._single_downsamples) if single == round(single))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W 4"]:
        """Decode a rectangle of a level, in its own pixels, to within half a level-0 pixel."""
        tile_px = self.level_tiles[level]
        if math.prod(tile_px) > _MOST_TILE_PX:
            raise DecodeError(f"the level is said to have tiles of {tile_px[0]} × {tile_px[1]} px")
        single = self._single_downsamples[level]
        if single == round(single) or max(width, height) <= _PAINTED_PX:
            return self._paint(level, x, y, width, height)
        rgba = np.empty((height, width, 4), np.uint8)
        for top in range(0, height, _PAINTED_PX):
            for left in range(0, width, _PAINTED_PX):
                size = min(_PAINTED_PX, width - left), min(_PAINTED_PX, height - top)
                rgba[top : top + size[1], left : left + size[0]] = self._paint(level, x + left, y + top, *size)
        return rgba

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    def _tile_of(self, level: int) -> tuple[int, int]:
        stated = (self.properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height"))
        width, height = (int(text) if text else _COMMON_TILE_PX for text in stated)
        return width, height

    def _paint(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        single = self._single_downsamples[level]
        location = (round(x * single), round(y * single))
        try:
            return np.asarray(self._slide.read_region(location, level, (width, height)))
        except openslide.OpenSlideError as error:
            raise DecodeError(said_by(error)) from error


def _properties(slide: openslide.OpenSlide) -> dict[str, str]:
    """Return the file's properties, except those with names that OpenSlide's binding cannot encode and look up."""
    properties = {}
    for name in slide.properties:
        with contextlib.suppress(KeyError, UnicodeError):
            properties[name] = slide.properties[name]
    return properties
