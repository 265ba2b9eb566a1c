"""Read, decode and cache the segments of a TIFF: its tiles or strips."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import numpy as np

from maskattn.slide.formats.tiff_series import Plane, TiffLevel

__all__ = ["SegmentCache", "decode", "raw_rows"]

_CACHE_BYTES = 128 << 20
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # JPEG's SOF markers
_HEAD_BYTES = 4096


class SegmentCache:
    """A cache of decoded segments, limited in bytes, that drops the least recently used first."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, ...]) -> np.ndarray | None:
        """Return a cached segment and mark it as the most recently used; None if it is not cached."""
        segment = self._held.get(key)
        if segment is not None:
            self._held.move_to_end(key)
        return segment

    def put(self, key: tuple[int, ...], segment: np.ndarray) -> None:
        """Cache a segment, and drop others until all fit."""
        self._held[key] = segment
        self._bytes += segment.nbytes
        while self._bytes > _CACHE_BYTES and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all segments."""
        self._held.clear()
        self._bytes = 0


def raw_rows(level: TiffLevel, plane: Plane, strip: int) -> np.ndarray:
    """Read the uncompressed rows of a strip, (rows, width, samples)."""
    page, keyframe = plane.page, plane.page.keyframe
    samples = keyframe.samplesperpixel if len(level.planes) == 1 else 1
    dtype = np.dtype(page.parent.byteorder + keyframe.dtype.char)
    top = strip * level.segment[1]
    rows = min(level.segment[1], level.size[1] - top)
    row_bytes = level.size[0] * samples * dtype.itemsize
    assert plane.raw_offset is not None
    data = _bytes_at(page, plane.raw_offset + top * row_bytes, rows * row_bytes)
    return np.frombuffer(data, dtype).astype(keyframe.dtype, copy=False).reshape(rows, level.size[0], samples)


def decode(level: TiffLevel, plane: Plane, row: int, column: int) -> np.ndarray | None:
    """Decode a tile or strip, (rows, columns, samples); None if it was never written."""
    page, keyframe = plane.page, plane.page.keyframe
    index = plane.first + row * level.columns + column
    offset, size = page.dataoffsets[index], page.databytecounts[index]
    if not offset or not size:
        return None
    tables = {}
    if int(keyframe.compression) in (6, 7, 33007, 34892):
        tables = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}
    data = _bytes_at(page, offset, size)
    _check_stated_size(data, level.segment)
    segment: np.ndarray | None = keyframe.decode(data, index, **tables)[0]
    return None if segment is None else segment[0]


def _bytes_at(page: Any, offset: int, size: int) -> bytes:
    handle = page.parent.filehandle
    handle.seek(offset)
    data: bytes = handle.read(size)
    if len(data) < size:
        raise EOFError(f"the file ends {size - len(data)} bytes before byte {offset + size}, where the data should end")
    return data


def _check_stated_size(data: bytes, segment: tuple[int, int]) -> None:
    """Refuse a JPEG or JPEG 2000 that would decode to far more than its segment, which may not fit into memory."""
    stated = _jpeg_size(data) or _jpeg_2000_size(data[:_HEAD_BYTES])
    if stated is not None and stated[0] * stated[1] > 4 * segment[0] * segment[1]:
        raise ValueError(f"a segment of {segment[0]} x {segment[1]} px states a size of {stated[0]} x {stated[1]}")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(b"\xff\xd8"):
        return None
    offset = 2
    while offset + 9 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, offset + 5)
            return width, height
        (length,) = struct.unpack_from(">H", data, offset + 2)
        offset += 1 if marker == 0xFF else 2 + length
    return None


def _jpeg_2000_size(head: bytes) -> tuple[int, int] | None:
    offset = head.find(b"\xff\x4f\xff\x51")
    if offset < 0 or offset + 24 > len(head):
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", head, offset + 8)
    return max(0, right - left), max(0, bottom - top)
