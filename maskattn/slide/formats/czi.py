"""Describe a Zeiss CZI file that OpenSlide does not open, from its subblock directory."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from maskattn.slide.formats.image import NotRead

__all__ = ["describe_czi"]

_SEGMENT_HEAD = 32  # id of 16 bytes, allocated and used size
_MOST_ENTRIES = 1 << 20
_REMEDY = (
    "not every CZI is read: export this one as OME-TIFF, from ZEN or QuPath, or with Bio-Formats' "
    "`bfconvert -tilex 512 -tiley 512 -pyramid-resolutions 4 -pyramid-scale 4 IN.czi OUT.ome.tif`"
)
_NAMES = {"S": "scenes", "C": "channels", "Z": "focal planes", "T": "points in time"}


def describe_czi(path: Path) -> NotRead:
    """Describe the contents of a CZI file, as far as its directory can be read.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            extents = _extents(file)
        except (struct.error, ValueError):
            extents = {}
    if not {"X", "Y"} <= extents.keys():
        return NotRead("a Zeiss CZI", _REMEDY)
    sizes = {name: end - start for name, (start, end) in extents.items()}
    more = "".join(f", {sizes[axis]} {name}" for axis, name in _NAMES.items() if sizes.get(axis, 1) > 1)
    return NotRead(f"a Zeiss CZI of {sizes['X']} × {sizes['Y']} px{more}", _REMEDY)


def _extents(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return the first position and the end along each dimension, over all subblocks of the directory."""
    head = file.read(_SEGMENT_HEAD + 80)
    (directory,) = struct.unpack_from("<q", head, _SEGMENT_HEAD + 52)
    file.seek(directory)
    head = file.read(_SEGMENT_HEAD + 128)
    if not head.startswith(b"ZISRAWDIRECTORY"):
        raise ValueError("no directory")
    (entries,) = struct.unpack_from("<i", head, _SEGMENT_HEAD)
    extents: dict[str, tuple[int, int]] = {}
    for _ in range(min(entries, _MOST_ENTRIES)):
        (dimensions,) = struct.unpack_from("<i", file.read(32), 28)
        if not 0 <= dimensions <= 32:
            raise ValueError("no directory entry")
        for _ in range(dimensions):
            name, start, size, _, _ = struct.unpack("<4siifi", file.read(20))
            axis = name.rstrip(b"\0").decode("ascii", errors="replace")
            first, last = extents.get(axis, (start, start + size))
            extents[axis] = min(first, start), max(last, start + size)
    return extents
