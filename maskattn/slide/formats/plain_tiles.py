"""Slides that OpenSlide opens, whose plain TIFF tiles imagecodecs decodes: to the same pixels, in a third of the time.

OpenSlide draws each decoded tile onto a canvas, which takes longer than decoding it. Tiles that lie in the file as they
are shown need no drawing: those of Aperio's slides and of TIFFs of no vendor, on levels whose pixels are not shifted.
OpenSlide keeps everything else: what the file says of itself, the other levels, and every rectangle with a tile that is
not as its level promises, so that damage is found and named as before.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from maskattn.shapes import UInt8
from maskattn.slide.formats.openslide_image import OpenSlideImage
from maskattn.slide.formats.tiff_segments import SegmentCache, copy_segments, decode_exactly
from maskattn.slide.formats.tiff_series import Plane, TiffLevel

__all__ = ["PlainTilesImage", "with_plain_tiles"]

# Slides of these vendors show each tile where it lies; others overlap tiles, or move them.
_VENDORS = ("aperio", "generic-tiff")
# None, LZW, JPEG, deflate (both codes), and Aperio's two JPEG 2000.
_COMPRESSIONS = (1, 5, 7, 8, 32946, 33003, 33005)
_JPEG, _RGB, _YCBCR = 7, 2, 6
_MOST_TILE_PX = 16 << 20  # larger ones are left to OpenSlide, and its bounds of memory


class PlainTilesImage:
    """A slide whose plain levels are decoded without OpenSlide; see :class:`maskattn.slide.formats.image.SlideImage`.

    Args:
        image: the slide as OpenSlide opened it.
        file: the same file, open in tifffile.
        levels: the plain levels, by their numbers.
    """

    def __init__(self, image: OpenSlideImage, file: tifffile.TiffFile, levels: dict[int, TiffLevel]) -> None:
        self._image, self._file, self._levels = image, file, levels
        self._segments = SegmentCache()
        weakref.finalize(self, file.close)
        self.decoder = f"{image.decoder}, imagecodecs {imagecodecs.__version__}"
        self.vendor = image.vendor
        self.series = image.series
        self.level_dimensions = image.level_dimensions
        self.level_downsamples = image.level_downsamples
        self.level_tiles = image.level_tiles
        self.properties = image.properties
        self.associated_images = image.associated_images

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
        """Decode a rectangle of a level, in its own pixels."""
        plain = self._levels.get(level)
        if plain is not None:
            pixels = np.empty((height, width, 3), np.uint8)
            # Codecs raise errors of many kinds; OpenSlide says what is wrong, or reads the rectangle all the same.
            with contextlib.suppress(Exception):
                copy_segments(pixels, plain, x, y, lambda row, column: self._tile(level, plain, row, column))
                return pixels
        return self._image.read(level, x, y, width, height)

    def close(self) -> None:
        """Close the file."""
        self._segments.clear()
        self._file.close()
        self._image.close()

    def _tile(self, number: int, level: TiffLevel, row: int, column: int) -> np.ndarray:
        key = (number, row, column)
        known = self._segments.get(key)
        if known is None:
            known = decode_exactly(level, level.planes[0], row, column)
            self._segments.put(key, known)
        return known


def with_plain_tiles(image: OpenSlideImage, path: Path) -> OpenSlideImage | PlainTilesImage:
    """Return the slide with its plain levels decoded by imagecodecs; the slide itself if it has none."""
    if image.vendor not in _VENDORS:
        return image
    with contextlib.ExitStack() as opened, contextlib.suppress(Exception):
        # tifffile raises errors of many kinds; OpenSlide has opened the file.
        file = opened.enter_context(tifffile.TiffFile(path))
        levels = _plain_levels(image, file)
        if levels:
            opened.pop_all()
            return PlainTilesImage(image, file, levels)
    return image


def _plain_levels(image: OpenSlideImage, file: tifffile.TiffFile) -> dict[int, TiffLevel]:
    pages = [page for page in file.pages if page.is_tiled]
    sizes = Counter((page.imagewidth, page.imagelength) for page in pages)
    found = {(page.imagewidth, page.imagelength): page for page in pages if _is_plain(page)}
    levels = {}
    for number in image.unshifted_levels:
        size = image.level_dimensions[number]
        if size in found and sizes[size] == 1:
            page = found[size]
            levels[number] = TiffLevel(size, (page.tilewidth, page.tilelength), (Plane(page),))
    return levels


def _is_plain(page: Any) -> bool:
    """Return whether a page consists of whole tiles of 8-bit RGB, none of which is missing."""
    compression, photometric = int(page.compression), int(page.photometric)
    if compression not in _COMPRESSIONS or photometric not in ((_RGB, _YCBCR) if compression == _JPEG else (_RGB,)):
        return False
    if page.tags.valueof("Orientation", 1) != 1 or page.tilewidth * page.tilelength > _MOST_TILE_PX:
        return False
    if page.dtype != np.uint8 or page.bitspersample != 8 or page.samplesperpixel != 3 or int(page.planarconfig) != 1:
        return False
    tiles = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength)
    offsets, lengths = page.dataoffsets, page.databytecounts
    # Of Aperio's missing tiles OpenSlide draws those of another level.
    return page.imagedepth == 1 and len(offsets) == len(lengths) == tiles and min(offsets) > 0 and min(lengths) > 0
