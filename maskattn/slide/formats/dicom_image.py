"""DICOM slides that wsidicom decodes from file objects, described as OpenSlide describes the same files.

A slide on a disk is OpenSlide's, which finds the series' files by itself but reads no file objects. The tiles are
decoded one by one; the most recent ones are kept for neighbouring regions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import wsidicom
from pydicom.filereader import read_partial
from upath import UPath
from wsidicom.config import Settings, use_settings
from wsidicom.file import WsiDicomFileSource
from wsidicom.file.io.wsidicom_io import WsiDicomReadIO
from wsidicom.geometry import Point

from maskattn.shapes import UInt8
from maskattn.slide.formats.image import DecodeError, axis_downsamples
from maskattn.slide.formats.remedies import said_by
from maskattn.slide.formats.tiff_segments import SegmentCache

__all__ = ["DicomImage"]

# wsidicom logs oddities of files; without a handler, Python would print them on the terminal.
logging.getLogger("wsidicom").addHandler(logging.NullHandler())

_PER_FRAME = 0x52009230  # what follows describes single tiles, and then come the pixels
_GROUP_LENGTH = "FileMetaInformationGroupLength"
_BINARY = ("OB", "OD", "OF", "OL", "OV", "OW", "UN")
_PLAIN = Settings(strict_tile_size_check=False, decoded_frame_cache_size=0, encoded_frame_cache_size=0)


class DicomImage:
    """A DICOM slide open in wsidicom; see :class:`maskattn.slide.formats.image.SlideImage`.

    Args:
        files: the file objects of the series.

    Raises:
        ValueError: a level is not of the plain kind, which is 8-bit RGB in one focal plane, or is not read.
        Exception: of wsidicom and pydicom, which raise errors of many kinds.
    """

    def __init__(self, files: Sequence[RawIOBase]) -> None:
        self._segments = SegmentCache()
        headers = [_header_of(file) for file in files]
        self._levels = [instance.image_data for instance in _levels_of(files)]
        _check_levels(self._levels, headers)
        self.decoder = f"wsidicom {wsidicom.__version__}, pydicom {pydicom.__version__}"
        self.vendor: str | None = "dicom"
        self.series: tuple[str, ...] = ()
        sizes = [(level.image_size.width, level.image_size.height) for level in self._levels]
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(sizes)
        means = tuple((sizes[0][0] / width + sizes[0][1] / height) / 2 for width, height in sizes)
        self.level_downsamples = axis_downsamples(self.level_dimensions, means)
        self.level_tiles = tuple((level.tile_size.width, level.tile_size.height) for level in self._levels)
        finest = next(one for one in headers if _is_level(one) and one.TotalPixelMatrixColumns == sizes[0][0])
        self.properties = _properties(finest)
        kinds = {str(one.ImageType[2]).lower(): one for one in headers if len(one.get("ImageType", ())) > 2}
        names = {"label": "label", "overview": "macro", "thumbnail": "thumbnail"}
        self.associated_images = tuple(sorted(names[kind] for kind in kinds if kind in names))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W 3"]:
        """Decode a rectangle of a level, in its own pixels."""
        tile_width, tile_height = self.level_tiles[level]
        rgb = np.empty((height, width, 3), np.uint8)
        try:
            for row in range(y // tile_height, -(-(y + height) // tile_height)):
                for column in range(x // tile_width, -(-(x + width) // tile_width)):
                    tile = self._tile(level, row, column)
                    left, top = column * tile_width, row * tile_height
                    first_x, first_y = max(x, left), max(y, top)
                    last_x, last_y = min(x + width, left + tile_width), min(y + height, top + tile_height)
                    rgb[first_y - y : last_y - y, first_x - x : last_x - x] = tile[
                        first_y - top : last_y - top, first_x - left : last_x - left
                    ]
        except Exception as error:  # decoders raise errors of many kinds
            raise DecodeError(said_by(f"{type(error).__name__}: {error}")) from error
        return rgb

    def close(self) -> None:
        """Let go of the decoded tiles; whoever opened the files closes them."""
        self._segments.clear()

    def _tile(self, level: int, row: int, column: int) -> np.ndarray:
        key = (level, row, column)
        tile = self._segments.get(key)
        if tile is None:
            image = self._levels[level]
            tile = np.asarray(image.get_decoded_tile(Point(column, row), image.default_z, image.default_path, False))
            self._segments.put(key, tile)
        return tile


def _levels_of(files: Sequence[RawIOBase]) -> list[Any]:
    """Return wsidicom's instances of the levels, the finest first."""
    with use_settings(_PLAIN):
        # The path is for messages. One on a disk would be opened once more.
        streams = []
        for file in files:
            file.seek(0)
            streams.append(WsiDicomReadIO(file, UPath(f"memory:///{Path(getattr(file, 'name', 'slide')).name}")))
        return sorted(WsiDicomFileSource(streams).level_instances, key=lambda instance: -instance.size.width)


def _check_levels(levels: Sequence[Any], headers: Sequence[Any]) -> None:
    """Check that all levels are there, which wsidicom passes over if it cannot read them, and of the plain kind."""
    expected = sorted({int(one.TotalPixelMatrixColumns) for one in headers if _is_level(one)}, reverse=True)
    if [level.image_size.width for level in levels] != expected:
        raise ValueError(f"wsidicom must read all levels, got {len(levels)} of {len(expected)}")
    for level in levels:
        plain = level.samples_per_pixel == 3 and level.bits == 8
        if not plain or len(level.focal_planes) > 1 or len(level.optical_paths) > 1:
            raise ValueError("a level must be 8-bit RGB in one focal plane")


def _header_of(file: RawIOBase) -> Any:
    """Return a file's elements before those that describe single tiles."""
    file.seek(0)
    return read_partial(file, stop_when=lambda tag, vr, length: tag >= _PER_FRAME)


def _is_level(header: Any) -> bool:
    return list(header.get("ImageType", ()))[2:3] == ["VOLUME"]


def _properties(header: Any) -> dict[str, str]:
    """Return the metadata of the finest level under OpenSlide's names."""
    properties = dict(_texts(header.file_meta, "dicom.")) | dict(_texts(header, "dicom."))
    properties["openslide.vendor"] = "dicom"
    shared = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
    for name, axis in (("openslide.mpp-x", 1), ("openslide.mpp-y", 0)):  # DICOM gives the spacing of rows first
        spacing_mm = properties.get(f"{shared}[{axis}]")
        if spacing_mm:
            properties[name] = f"{float(spacing_mm) * 1000:.17g}"
    power = properties.get("dicom.OpticalPathSequence[0].ObjectiveLensPower")
    if power:
        properties["openslide.objective-power"] = f"{float(power):.17g}"
    return properties


def _texts(elements: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for element in elements:
        if element.keyword == _GROUP_LENGTH:
            continue
        name = f"{prefix}{element.keyword}"
        if element.VR == "SQ":
            for number, item in enumerate(element.value):
                yield from _texts(item, f"{name}[{number}].")
        elif element.keyword and element.VR not in _BINARY and not element.is_empty:
            if element.VM > 1:
                yield from ((f"{name}[{number}]", str(value)) for number, value in enumerate(element.value))
            else:
                yield name, str(element.value)
