"""Decoding of TIFF masks with tifffile: samples of any depth, and pyramids of pages or of SubIFDs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.shapes import Shaped, UInt8

__all__ = ["TiffMask", "read_tiff"]

_MOST_PAGES = 1024
_PLAIN_COMPRESSIONS = (1, 8, 32946)  # none and deflate
_JPEG_COMPRESSIONS = (6, 7, 33003, 33004, 33005, 33007, 34892)


@dataclass(frozen=True, eq=False)
class TiffMask:
    """One page of a TIFF.

    Attributes:
        samples: (H, W), or (H, W, C).
        alpha: whether the channel after grey or RGB is alpha.
        palette_N4: (N, 4) RGBA of each index; None if there is no palette.
        jpeg: whether the page is compressed by JPEG.
        equal_pages: number of pages of the same size as the first, including the first.
    """

    samples: Shaped[np.ndarray, "H W ..."]
    alpha: bool
    palette_N4: UInt8[np.ndarray, "N 4"] | None
    jpeg: bool
    equal_pages: int


def read_tiff(path: Path, level_of: Callable[[list[tuple[int, int]]], int]) -> TiffMask | None:
    """Decode the page that ``level_of`` chooses from the (width, height) of all pages.

    Returns None if Pillow should decode the file. That is the case for compressions that need the package imagecodecs,
    which may be missing and crashes on some damaged files, so that it is used only where Pillow would lose bits or a
    level; and for colours that are neither grey, palette, RGB nor YCbCr.
    """
    import tifffile

    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        return None
    with file:
        pages = list(itertools.islice(file.pages, _MOST_PAGES))
        first: Any = pages[0]
        own_pages = len(pages)
        pages += list(first.pages or ())
        sizes = [(page.imagewidth, page.imagelength) for page in pages]
        level = level_of(sizes)
        page: Any = pages[level]
        page = page.aspage() if hasattr(page, "aspage") else page
        if page.photometric not in (0, 1, 2, 3, 6, 4) or page.imagedepth != 1:
            return None
        if page.compression not in _PLAIN_COMPRESSIONS and level < own_pages and _is_whole_in_pillow(page):
            return None
        try:
            samples = page.asarray()
        except (ValueError, ImportError, KeyError, AttributeError) as error:
            if "codec" in str(error) or "COMPRESSION" in str(error):
                return None
            raise
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    if page.photometric == 0 and samples.dtype.kind in "bu":  # white is zero
        samples = ~samples if samples.dtype.kind == "b" else (1 << page.bitspersample) - 1 - samples
    palette_N4 = None
    if page.photometric == 3 and page.colormap is not None:
        colours = np.asarray(page.colormap).T >> 8
        palette_N4 = np.concatenate([colours, np.full((len(colours), 1), 255)], axis=1).astype(np.uint8)
    alpha = any(int(kind) in (1, 2) for kind in page.extrasamples or ())
    return TiffMask(samples, alpha, palette_N4, page.compression in _JPEG_COMPRESSIONS, sizes.count(sizes[0]))


def _is_whole_in_pillow(page: Any) -> bool:
    """Return whether Pillow keeps every bit of the page's samples."""
    return page.dtype is None or page.dtype.itemsize == 1 or (page.dtype == np.uint16 and page.samplesperpixel == 1)
