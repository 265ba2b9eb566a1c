"""Read, decode and cache the segments of a TIFF: its tiles or strips."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from maskattn.slide.formats.tiff_series import Plane, TiffLevel

__all__ = ["SegmentCache", "copy_segments", "decode", "decode_exactly", "raw_rows"]

_CACHE_BYTES = 128 << 20
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # JPEG's SOF markers
_HEAD_BYTES = 4096
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_MOST_PADDING = 16  # bytes after a JPEG's end


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


def copy_segments(
    out_HWC: np.ndarray, level: TiffLevel, x: int, y: int, segment_at: Callable[[int, int], np.ndarray | None]
) -> None:
    """Copy the segments under a rectangle of a level into an array of its size.

    Args:
        out_HWC: receives the pixels; those of segments that were never written stay as they are.
        level: the level.
        x, y: the rectangle's corner, in pixels of the level.
        segment_at: returns the segment of a row and column, or None if it was never written.
    """
    height, width = out_HWC.shape[:2]
    step_x, step_y = level.segment
    for row in range(y // step_y, -(-(y + height) // step_y)):
        for column in range(x // step_x, -(-(x + width) // step_x)):
            segment = segment_at(row, column)
            if segment is None:
                continue
            left, top = column * step_x, row * step_y
            first_x, first_y = max(x, left), max(y, top)
            last_x = min(x + width, left + segment.shape[1])
            last_y = min(y + height, top + segment.shape[0])
            out_HWC[first_y - y : last_y - y, first_x - x : last_x - x] = segment[
                first_y - top : last_y - top, first_x - left : last_x - left
            ]


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
    index = plane.first + row * level.columns + column
    offset, size = plane.page.dataoffsets[index], plane.page.databytecounts[index]
    if not offset or not size:
        return None
    data = _bytes_at(plane.page, offset, size)
    stated = _stated_size(data)
    # What decodes to far more than its segment may not fit into memory.
    if stated is not None and stated[0] * stated[1] > 4 * level.segment[0] * level.segment[1]:
        raise ValueError(_other_size(level.segment, stated))
    return _decoded(plane.page, index, data)


def decode_exactly(level: TiffLevel, plane: Plane, row: int, column: int) -> np.ndarray:
    """Decode a tile that has to be whole, (rows, columns, samples).

    Raises:
        ValueError: it is of another size than the level's tiles, or does not end as a JPEG should.
    """
    index = plane.first + row * level.columns + column
    data = _bytes_at(plane.page, plane.page.dataoffsets[index], plane.page.databytecounts[index])
    stated = _stated_size(data)
    if stated is not None and stated != level.segment:
        raise ValueError(_other_size(level.segment, stated))
    if data.startswith(_JPEG_START) and _JPEG_END not in data[-_MOST_PADDING:]:
        raise ValueError("a JPEG without its end")
    tile = _decoded(plane.page, index, data)
    if tile is None or tile.shape[:2] != level.segment[::-1]:
        raise ValueError(_other_size(level.segment, (0, 0) if tile is None else tile.shape[1::-1]))
    return tile


def _decoded(page: Any, index: int, data: bytes) -> np.ndarray | None:
    keyframe, tables = page.keyframe, {}
    if int(keyframe.compression) in (6, 7, 33007, 34892):
        tables = {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}
    segment: np.ndarray | None = keyframe.decode(data, index, **tables)[0]
    return None if segment is None else segment[0]


def _bytes_at(page: Any, offset: int, size: int) -> bytes:
    handle = page.parent.filehandle
    handle.seek(offset)
    data: bytes = handle.read(size)
    if len(data) < size:
        raise EOFError(f"the file ends {size - len(data)} bytes before byte {offset + size}, where the data should end")
    return data


def _stated_size(data: bytes) -> tuple[int, int] | None:
    """Return the (width, height) that a JPEG or JPEG 2000 states; None for other data."""
    return _jpeg_size(data) or _jpeg_2000_size(data[:_HEAD_BYTES])


def _other_size(segment: tuple[int, int], found: tuple[int, ...]) -> str:
    return f"a segment of {segment[0]} x {segment[1]} px states a size of {found[0]} x {found[1]}"


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(_JPEG_START):
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
