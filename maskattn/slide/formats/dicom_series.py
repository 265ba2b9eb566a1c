"""Read which series a DICOM file belongs to, and its size, from the part of it that precedes the pixels."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["SeriesFile", "read_series", "read_series_file"]

_IMAGE_TYPE, _SERIES_UID, _TOTAL_COLUMNS = 0x00080008, 0x0020000E, 0x00480006
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_MOST_BYTES = 1024


@dataclass(frozen=True)
class SeriesFile:
    """A file of a DICOM series.

    Attributes:
        series_uid: the Series Instance UID.
        columns: total width of the file's pixel matrix, in pixels.
        is_level: whether the file is a level of the slide, and not a label or an overview.
    """

    series_uid: str
    columns: int
    is_level: bool


def read_series_file(path: Path) -> SeriesFile | None:
    """Read the file's series; None if it is not a DICOM file of a kind that OpenSlide reads."""
    try:
        with path.open("rb") as file:
            return read_series(file)
    except OSError:
        return None


def read_series(file: BinaryIO) -> SeriesFile | None:
    """Read the series from an open file, or from its beginning; None if it is not a DICOM file of such a kind."""
    wanted = {_IMAGE_TYPE: b"", _SERIES_UID: b"", _TOTAL_COLUMNS: b""}
    try:
        file.seek(128)
        if file.read(4) != b"DICM":
            return None
        for tag, value in _elements(file):
            if tag in wanted:
                wanted[tag] = value
            if tag >= _TOTAL_COLUMNS:
                break
    except (OSError, ValueError, struct.error, RecursionError):
        return None
    uid = wanted[_SERIES_UID].rstrip(b"\0 ").decode("ascii", "replace")
    columns = wanted[_TOTAL_COLUMNS]
    flavour = wanted[_IMAGE_TYPE].split(b"\\")[2:3]
    return SeriesFile(uid, int.from_bytes(columns, "little"), flavour == [b"VOLUME"]) if uid else None


def _elements(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the tags and values of a data set in explicit VR; sequences and long values are yielded empty.

    Raises:
        ValueError: the bytes are not a data set in explicit VR.
        struct.error: the data set ends in the middle of an element.
    """
    while True:
        group, element = struct.unpack("<HH", file.read(4))
        tag = group << 16 | element
        if tag == _ITEM_END:
            file.seek(4, os.SEEK_CUR)
            return
        kind = file.read(2)
        if not (kind.isalpha() and kind.isupper()):
            raise ValueError(f"an element must have a value representation, got {kind!r}")
        form = "<2xI" if kind in _LONG else "<H"
        (length,) = struct.unpack(form, file.read(struct.calcsize(form)))
        if length == _UNDEFINED:
            _skip_items(file)
            yield tag, b""
        elif length > _MOST_BYTES:
            file.seek(length, os.SEEK_CUR)
            yield tag, b""
        else:
            yield tag, file.read(length)


def _skip_items(file: BinaryIO) -> None:
    """Skip the items of a sequence of undefined length."""
    while True:
        group, element, length = struct.unpack("<HHI", file.read(8))
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise ValueError(f"a sequence must hold items, got the tag {tag:08X}")
        if length != _UNDEFINED:
            file.seek(length, os.SEEK_CUR)
        else:
            for _ in _elements(file):
                pass
