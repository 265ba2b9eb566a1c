"""The interface of a slide's decoder: levels that are read in their own pixels.

Level choice, resampling and what becomes of damage are :class:`maskattn.slide.reader.SlideReader`'s, once for all
formats.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from maskattn.shapes import UInt8

__all__ = ["DecodeError", "NotRead", "SlideImage", "axis_downsamples"]


class DecodeError(Exception):
    """A region of a level cannot be decoded; the message is the decoder's own reason."""


class NotRead(Exception):  # noqa: N818 (no error of the file's)
    """A file, or what was asked of it, is of a kind that is not read.

    Args:
        what: what it is, as it stands after "got".
        remedy: what to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy


class SlideImage(Protocol):
    """An open slide file.

    Attributes:
        decoder: name and version of the library that decodes it.
        vendor: the format, e.g. "aperio" or "ome-tiff".
        series: a line for each series of a file that may hold several; empty where there is one.
        level_dimensions: (width, height) of each level in its own pixels, the finest first.
        level_downsamples: level-0 pixels per pixel of each level, along x and along y.
        level_tiles: (width, height) of the pieces in which each level is decoded, in its own pixels.
        properties: everything the file says of itself.
        associated_images: names of the label, the macro image and the like.
    """

    decoder: str
    vendor: str | None
    series: tuple[str, ...]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    level_tiles: tuple[tuple[int, int], ...]
    properties: dict[str, str]
    associated_images: tuple[str, ...]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
        """Decode a rectangle that lies within a level; x, y, width and height in pixels of that level.

        Returns:
            (height, width, 4) uint8 RGBA, not premultiplied, or (height, width, 3) RGB.

        Raises:
            DecodeError: it cannot be decoded; the image must be closed and opened again.
        """

    def close(self) -> None:
        """Close the file."""


def axis_downsamples(
    level_dimensions: tuple[tuple[int, int], ...], stated: tuple[float, ...] | None = None
) -> tuple[tuple[float, float], ...]:
    """Level-0 pixels per pixel of each level, along x and along y.

    Each axis has its own ratio: a side of 375 px quartered to 93 px is scaled by 4.03, its neighbour of 16,000 by 4.
    Where the format states a whole number that explains both sides within a pixel, the last pixel was cut off instead.

    Args:
        level_dimensions: (width, height) of each level.
        stated: the format's own single number for each level.
    """
    width, height = level_dimensions[0]
    ratios = []
    for level, (level_width, level_height) in enumerate(level_dimensions):
        ratio = (width / level_width, height / level_height)
        if stated is not None:
            whole = stated[level]
            fits = abs(width / whole - level_width) < 1 and abs(height / whole - level_height) < 1
            if whole == round(whole) and fits:
                ratio = (whole, whole)
        ratios.append(ratio)
    return tuple(ratios)
