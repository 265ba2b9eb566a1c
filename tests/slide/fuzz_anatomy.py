"""Where the vulnerable parts of a slide file lie: fields of TIFF directories, markers of JPEG, text, DICOM elements.

A ``Part`` is a run of bytes and the kind of thing that it holds. Anything that cannot be parsed is skipped, so that
damaged files can be taken apart too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

Holds = Literal["number", "rational", "text", "marker", "bytes"]

TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
WIDTH, DESCRIPTION, STRIP_OFFSETS, STRIP_COUNTS, SUB_IFDS, TILE_OFFSETS, TILE_COUNTS, JPEG_TABLES = (
    *(256, 270, 273, 279, 330, 324, 325, 347),
)
LONG_DICOM = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UT", b"UN", b"UC", b"UR", b"SV", b"UV"}
UNDEFINED = 0xFFFFFFFF
MOST_DIRECTORIES, MOST_TILES = 32, 64


@dataclass(frozen=True)
class Part:
    """Bytes [start, start + size) of a file; ``order`` is the byte order of numbers, "<" or ">"."""

    name: str
    holds: Holds
    start: int
    size: int
    order: str = "<"

    @property
    def field(self) -> str:
        """What it is a part of: a tag of a directory, an element, a tile."""
        return self.name.partition(":")[0]

    @property
    def in_tile(self) -> bool:
        return ", tile " in self.name or "(fffe," in self.name


def find_parts(data: bytes) -> list[Part]:
    """The parts of a TIFF or DICOM file; any other file has none."""
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return tiff_parts(data)
        if data[128:132] == b"DICM":
            return dicom_parts(data)
    except struct.error:
        pass
    return []


def tiff_parts(data: bytes) -> list[Part]:
    order, big = "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")
    offset_size = 8 if big else 4
    number = "Q" if big else "I"
    start = 8 if big else 4
    parts = [
        Part("byte order and version", "bytes", 0, 4),
        Part("offset of the first directory", "number", start, offset_size, order),
    ]
    waiting, seen = [struct.unpack_from(order + number, data, start)[0]], set()
    while waiting and len(seen) < MOST_DIRECTORIES:
        at = waiting.pop(0)
        if at in seen or not 0 < at < len(data) - 8:
            continue
        seen.add(at)
        directory, following = directory_parts(data, at, order, big)
        parts += directory
        waiting += following
    return parts


def directory_parts(data: bytes, at: int, order: str, big: bool) -> tuple[list[Part], list[int]]:
    """The parts of a directory and of what it points to, and the offsets of further directories."""
    count_size, entry, value = (8, 20, 12) if big else (2, 12, 8)
    number, number_size = ("Q", 8) if big else ("I", 4)
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    parts = [Part(f"directory at {at}: its number of entries", "number", at, count_size, order)]
    following: list[int] = []
    arrays: dict[int, list[int]] = {}
    for index in range(min(entries, 100)):
        here = at + count_size + index * entry
        tag, kind = struct.unpack_from(order + "HH", data, here)
        (count,) = struct.unpack_from(order + number, data, here + 4)
        name = f"directory at {at}, tag {tag}"
        parts += [
            Part(f"{name}: the tag", "number", here, 2, order),
            Part(f"{name}: its type", "number", here + 2, 2, order),
            Part(f"{name}: its count", "number", here + 4, number_size, order),
            Part(f"{name}: its value or offset", "number", here + value, number_size, order),
        ]
        width = TYPE_BYTES.get(kind, 1)
        inline = count * width <= number_size
        place = here + value if inline else struct.unpack_from(order + number, data, here + value)[0]
        if count * width == 0 or place + count * width > len(data):
            continue
        parts += value_parts(name, place, count, kind, order)
        if kind in (3, 4, 13, 16, 18) and tag in (SUB_IFDS, STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS):
            code = {2: "H", 4: "I", 8: "Q"}[width]
            arrays[tag] = list(struct.unpack_from(f"{order}{count}{code}", data, place))
        if tag == JPEG_TABLES:
            parts += jpeg_parts(data, f"{name}: tables", place, count)
    for offsets, counts in ((TILE_OFFSETS, TILE_COUNTS), (STRIP_OFFSETS, STRIP_COUNTS)):
        pairs = zip(arrays.get(offsets, ()), arrays.get(counts, ()), strict=False)
        for tile, (start, size) in list(enumerate(pairs))[:MOST_TILES]:
            if size and start + size <= len(data):
                parts += stream_parts(data, f"directory at {at}, tile {tile}", start, size)
    next_at = at + count_size + min(entries, 100) * entry
    parts.append(Part(f"directory at {at}: offset of the next", "number", next_at, number_size, order))
    following += [*struct.unpack_from(order + number, data, next_at), *arrays.get(SUB_IFDS, ())]
    return parts, following


def value_parts(name: str, place: int, count: int, kind: int, order: str) -> list[Part]:
    width = TYPE_BYTES.get(kind, 1)
    if kind == 2:
        return [Part(f"{name}: text", "text", place, count)]
    if kind in (5, 10):
        return [Part(f"{name}: a ratio", "rational", place, 8, order)]
    if kind in (1, 7) and count > 8:
        return [Part(f"{name}: bytes", "bytes", place, count)]
    return [
        Part(f"{name}: value {index}", "number", place + index * width, width, order)
        for index in range(min(count, MOST_TILES))
    ]


def stream_parts(data: bytes, name: str, start: int, size: int) -> list[Part]:
    """A tile's bytes, and the markers within where it is a JPEG or a JPEG 2000 codestream."""
    parts = [Part(f"{name}: its bytes", "bytes", start, size), Part(f"{name}: its head", "bytes", start, min(size, 32))]
    if data[start : start + 1] == b"\xff":
        parts += jpeg_parts(data, name, start, size)
    return parts


def jpeg_parts(data: bytes, name: str, start: int, size: int) -> list[Part]:
    """Segments up to the coded pixels: the marker, the length, the content; JPEG 2000 has the same build."""
    parts, at, end = [], start + 2, start + size
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = f"{name}: segment {marker:02x}"
        parts += [
            Part(f"{segment}, marker", "marker", at, 2),
            Part(f"{segment}, length", "number", at + 2, 2, ">"),
        ]
        if length > 2 and at + 2 + length <= end:
            parts.append(Part(f"{segment}, content", "bytes", at + 4, length - 2))
        if marker in (0xC0, 0xC2) and length >= 8:  # a frame's precision, height, width, components
            parts.append(Part(f"{segment}, height", "number", at + 5, 2, ">"))
            parts.append(Part(f"{segment}, width", "number", at + 7, 2, ">"))
            parts.append(Part(f"{segment}, components", "number", at + 9, 1))
        if marker == 0x51 and length >= 38:  # the size of a JPEG 2000 image and of its tiles
            parts += [Part(f"{segment}, size {i}", "number", at + 6 + 4 * i, 4, ">") for i in range(8)]
        if marker in (0xDA, 0x93):
            break
        at += 2 + length
    return parts


def dicom_parts(data: bytes) -> list[Part]:
    """Elements of every level in the order of the file; explicit VR, little endian."""
    parts, at = [Part("DICM", "bytes", 128, 4)], 132
    in_pixels, frames = False, -1  # the first item among the pixels says where the frames are
    while at + 8 <= len(data):
        group, element = struct.unpack_from("<HH", data, at)
        name = f"element ({group:04x},{element:04x}) at {at}"
        if group == 0xFFFE:  # an item or the end of one: what is in it comes next
            (length,) = struct.unpack_from("<I", data, at + 4)
            parts.append(Part(f"{name}: item", "number", at, 4))
            parts.append(Part(f"{name}: length", "number", at + 4, 4))
            at += 8
            if in_pixels and length != UNDEFINED and at + length <= len(data):
                if frames < 0:
                    starts = range(at, at + length - 3, 4)
                    parts += [Part(f"{name}: where frame {i} is", "number", place, 4) for i, place in enumerate(starts)]
                elif length:
                    parts += stream_parts(data, f"{name}, tile {frames}", at, length)
                frames += 1
                at += length
            continue
        kind = data[at + 4 : at + 6]
        long = kind in LONG_DICOM
        size, head = (4, 12) if long else (2, 8)
        (length,) = struct.unpack_from("<I" if long else "<H", data, at + head - size)
        parts += [
            Part(f"{name}: group", "number", at, 2),
            Part(f"{name}: tag", "number", at + 2, 2),
            Part(f"{name}: VR", "bytes", at + 4, 2),
            Part(f"{name}: length", "number", at + head - size, size),
        ]
        at += head
        if (group, element) == (0x7FE0, 0x0010) and length == UNDEFINED:
            in_pixels = True
        if kind == b"SQ" or length == UNDEFINED:
            continue
        if length and at + length <= len(data):
            holds: Holds = "number" if kind in (b"US", b"UL", b"SS", b"SL") else "text"
            holds = "bytes" if kind in (b"OB", b"OW", b"FD", b"FL") else holds
            parts.append(Part(f"{name}: value", holds, at, length))
        at += length
    return parts
