"""The interface of slide decoders: levels, each read in its own pixels.

:class:`maskattn.slide.reader.SlideReader` chooses levels, resamples and handles damage for all formats.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from maskattn.shapes import UInt8

__all__ = ["DecodeError", "NotRead", "SlideImage", "axis_downsamples"]


class DecodeError(Exception):
    """A region of a level cannot be decoded; the message is the decoder's own reason."""


class NotRead(Exception):  # noqa: N818 (not an error in the file)
    """A file, or the requested image in it, is of a kind that is not read.

    Args:
        what: a noun phrase that says what it is, which follows "which is" in the message.
        remedy: what the user can do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy


class SlideImage(Protocol):
    """An open slide file.

    Attributes:
        decoder: name and version of the library that decodes the file.
        vendor: the format, e.g. "aperio" or "ome-tiff".
        series: a line of text for each series; empty if the file holds only one.
        level_dimensions: (width, height) of each level in its own pixels, the finest first.
        level_downsamples: level-0 pixels per pixel of each level, along x and along y.
        level_tiles: (width, height) of the tiles or strips in which each level is decoded, in its own pixels.
        properties: the metadata of the file, by name.
        associated_images: names of the associated images, such as the label and the macro image.
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
            DecodeError: the region cannot be decoded; the image must be closed and opened again.
        """

    def close(self) -> None:
        """Close the file."""


def axis_downsamples(
    level_dimensions: tuple[tuple[int, int], ...], stated: tuple[float, ...] | None = None
) -> tuple[tuple[float, float], ...]:
    """Return the level-0 pixels per pixel of each level, along x and along y.

    Each axis has its own ratio: a height of 375 px reduced to 93 px is scaled by 4.03, a width of 16,000 px by 4.
    If the format states an integer that explains both sizes within a pixel, the last pixel was cut off, and the
    integer is the ratio of both axes.

    Args:
        level_dimensions: (width, height) of each level, in pixels.
        stated: the downsample that the format itself states for each level; None if it states none.
    """
    width, height = level_dimensions[0]
    ratios = []
    for level, (level_width, level_height) in enumerate(level_dimensions):
        ratio = (width / level_width, height / level_height)
        if stated is not None:
            single = stated[level]
            fits = abs(width / single - level_width) < 1 and abs(height / single - level_height) < 1
            if single == round(single) and fits:
                ratio = (single, single)
        ratios.append(ratio)
    return tuple(ratios)
