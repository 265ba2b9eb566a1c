"""Group ``.dcm`` files into slides: a DICOM slide has one or more files per level, with one Series Instance UID.

OpenSlide opens any of these files and finds the others in the folder. The file of the largest level represents the
slide. Only the few elements needed for this are read, from the part of a file that precedes the pixels.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from maskattn.slide.names import id_of_file

__all__ = ["SeriesFile", "one_per_series", "read_series_file"]

_SUFFIX = ".dcm"
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


def one_per_series(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the paths with their slides' ids, reduced to one ``.dcm`` file per series.

    A series that makes up its whole folder gets the folder's name as id, because DICOM files are rarely named after the
    slide.
    """
    paths = list(dict.fromkeys(paths))
    per_folder = Counter(path.parent for path in paths)
    several = Counter(path.parent for path in paths if path.suffix.lower() == _SUFFIX)
    series: dict[tuple[Path, str], dict[Path, SeriesFile]] = {}
    for path in paths:
        if path.suffix.lower() == _SUFFIX and several[path.parent] > 1:
            found = read_series_file(path)
            if found is not None:
                series.setdefault((path.parent, found.series_uid), {})[path] = found
    ids = {path: id_of_file(path) for path in paths}
    for (folder, _), files in series.items():
        first = max(files, key=lambda path: (files[path].is_level, files[path].columns))
        for path in files.keys() - {first}:
            del ids[path]
        if len(files) == per_folder[folder] > 1:
            ids[first] = id_of_file(f"{os.path.abspath(folder)}{_SUFFIX}")
    return ids


def read_series_file(path: Path) -> SeriesFile | None:
    """Read the file's series; None if it is not a DICOM file of a kind that OpenSlide reads."""
    wanted = {_IMAGE_TYPE: b"", _SERIES_UID: b"", _TOTAL_COLUMNS: b""}
    try:
        with path.open("rb") as file:
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
