"""Slides in TIFF that tifffile and imagecodecs decode: pyramids in SubIFDs, planar samples, series, qptiff.

Only the tiles or strips under a region are decoded; the most recent ones are kept for neighbouring regions.
"""

from __future__ import annotations

import logging
import weakref
from io import RawIOBase
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from maskattn.shapes import UInt8
from maskattn.slide.formats.image import DecodeError, NotRead, axis_downsamples
from maskattn.slide.formats.ome import OmeImage, ome_properties, read_ome
from maskattn.slide.formats.remedies import said_by
from maskattn.slide.formats.tiff_segments import SegmentCache, copy_segments, decode, raw_rows
from maskattn.slide.formats.tiff_series import Plane, TiffLevel, describe_series, levels_of

__all__ = ["TiffImage"]

# tifffile logs oddities of a file; without a handler, Python would print them on the terminal.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_RESOLUTION_UNITS = {2: "inch", 3: "centimeter"}
_TEXT_TAGS = ("ImageDescription", "Make", "Model", "Software", "DateTime", "Artist")


class TiffImage:
    """A slide open in tifffile; see :class:`maskattn.slide.formats.image.SlideImage`.

    Args:
        source: the slide file: its path, or the file object.
        series: index of the series; None takes the largest.

    Raises:
        NotRead: the file has no such series, or the series is not brightfield RGB.
        tifffile.TiffFileError, OSError: the file is not a TIFF, or cannot be read.
    """

    def __init__(self, source: Path | RawIOBase, series: int | None = None) -> None:
        self._file = tifffile.TiffFile(source)
        try:
            self._read_structure(series)
        except BaseException:
            self._file.close()
            raise
        self._segments = SegmentCache()
        weakref.finalize(self, self._file.close)

    def _read_structure(self, series: int | None) -> None:
        pages, found = self._file.pages, self._file.series
        description = pages.first.description
        images = read_ome(description)
        number = _choose(found, series)
        image = images[number] if number < len(images) else None
        self._levels = levels_of(found[number], pages, image)
        self._white = _white_of(found[number].keyframe, image)
        self._has_alpha = _alpha_of(found[number].keyframe)
        self.decoder = f"tifffile {tifffile.__version__}, imagecodecs {imagecodecs.__version__}"
        self.vendor: str | None = {"ome": "ome-tiff", "qpi": "qptiff"}.get(found[number].kind, "tiff")
        self.series = describe_series(found, images) if len(found) > 1 else ()
        self.level_dimensions = tuple(level.size for level in self._levels)
        self.level_downsamples = axis_downsamples(self.level_dimensions)
        self.level_tiles = tuple(level.segment for level in self._levels)
        self.properties = _properties(pages.first, found[number].keyframe) | ome_properties(description, number)
        self.associated_images = tuple(one.name for one in found if one.name.lower() in ("label", "macro", "thumbnail"))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
        """Decode a rectangle of a level, in its own pixels."""
        pyramid = self._levels[level]
        try:
            planes = [self._read_plane(pyramid, plane, x, y, width, height) for plane in pyramid.planes]
            return self._as_rgb(planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2))
        except Exception as error:  # codecs and tifffile raise errors of many kinds
            raise DecodeError(said_by(f"{type(error).__name__}: {error}")) from error

    def close(self) -> None:
        """Close the file."""
        self._segments.clear()
        self._file.close()

    def _read_plane(self, level: TiffLevel, plane: Plane, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read the samples of one plane, (height, width, samples of the plane)."""
        keyframe = plane.page.keyframe
        samples = keyframe.samplesperpixel if int(keyframe.planarconfig) == 1 else 1
        # segments that were never written are white
        out = np.full((height, width, samples), self._white, keyframe.dtype)
        copy_segments(out, level, x, y, lambda row, column: self._segment(level, plane, row, column))
        return out

    def _segment(self, level: TiffLevel, plane: Plane, row: int, column: int) -> np.ndarray | None:
        key = (id(plane.page), plane.first, row, column)
        known = self._segments.get(key)
        if known is not None:
            return known
        raw = plane.raw_offset is not None
        segment = raw_rows(level, plane, row) if raw else decode(level, plane, row, column)
        if segment is not None:
            self._segments.put(key, segment)
        return segment

    def _as_rgb(self, samples: np.ndarray) -> np.ndarray:
        """Convert samples of 8 or 16 bits to 8-bit RGB, or to RGBA if the file declares alpha."""
        if samples.dtype != np.uint8:
            wide = samples.astype(np.uint32)
            samples = np.minimum((wide * 255 + self._white // 2) // self._white, 255).astype(np.uint8)
        if not self._has_alpha:
            return np.ascontiguousarray(samples[..., :3])
        rgba = np.ascontiguousarray(samples[..., :4])
        if self._has_alpha == "associated":
            alpha = np.maximum(rgba[..., 3:].astype(np.uint16), 1)
            rgba[..., :3] = np.minimum((rgba[..., :3].astype(np.uint16) * 255 + alpha // 2) // alpha, 255)
        return rgba


def _choose(found: Any, series: int | None) -> int:
    if not found:
        raise NotRead("a TIFF without an image", "check that the file is complete")
    if series is None:
        areas = [one.shape[one.axes.index("X")] * one.shape[one.axes.index("Y")] for one in found]
        return areas.index(max(areas))
    if not 0 <= series < len(found):
        raise NotRead(f"series {series} of a file that has {len(found)}", f"give --series 0 to {len(found) - 1}")
    return series


def _white_of(keyframe: Any, image: OmeImage | None) -> int:
    """Return the value of white; OME-XML states it if a camera uses only 12 or 14 of 16 bits."""
    bits = 8 * keyframe.dtype.itemsize
    if bits == 16 and image is not None and image.significant_bits is not None and 8 < image.significant_bits < 16:
        bits = image.significant_bits
    return (1 << bits) - 1


def _alpha_of(keyframe: Any) -> str:
    """Return the kind of the fourth sample: "associated" alpha (premultiplied), "unassociated" alpha, or ""."""
    if keyframe.samplesperpixel < 4 or not keyframe.extrasamples:
        return ""
    return {1: "associated", 2: "unassociated"}.get(int(keyframe.extrasamples[0]), "")


def _properties(first: Any, keyframe: Any) -> dict[str, str]:
    """Return the values of the tags, under the names that OpenSlide gives them."""
    properties = {f"tiff.{name}": str(first.tags.valueof(name)) for name in _TEXT_TAGS if name in first.tags}
    tags = keyframe.tags
    unit = _RESOLUTION_UNITS.get(int(tags.valueof("ResolutionUnit", 2)))
    for name in ("XResolution", "YResolution"):
        numerator, denominator = tags.valueof(name, (0, 0))
        if numerator and denominator and unit is not None:
            properties |= {f"tiff.{name}": f"{numerator / denominator:.10g}", "tiff.ResolutionUnit": unit}
    properties["tiff.Compression"] = keyframe.compression.name
    properties["tiff.PhotometricInterpretation"] = keyframe.photometric.name
    return properties
