"""List the series of a TIFF and their levels, as tifffile finds them, and select those that are brightfield RGB.

Accepted are 8-bit RGB and 16-bit RGB, which is scaled to 8 bits; in tiles or strips; chunky, planar, or a page per
colour; with levels in SubIFDs or as reduced pages. Everything else is refused with a message that says what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from maskattn.slide.formats.image import NotRead
from maskattn.slide.formats.ome import OmeImage, read_ome
from maskattn.slide.formats.remedies import CONVERT

__all__ = ["Plane", "TiffLevel", "check_sample_format", "describe_series", "is_better_in_tifffile", "levels_of"]

# A tile or strip is always decoded completely, so a region of a few pixels may cost as much as the largest one.
_MOST_SEGMENT_PX = 32 << 20
_MOST_SAMPLES = 16
_RAW_STRIP_PX = 1 << 20
# None, LZW, JPEG, deflate (both codes), PackBits, JPEG 2000 (all codes), Zstandard: their decoded size is known.
_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 33003, 33004, 33005, 34712, 50000}
_KINDS_READ = {"ome", "qpi", "svs", "generic", "uniform", "shaped", "imagej"}
_NOT_RGB = {
    0: "greyscale",
    1: "greyscale",
    3: "a colour palette",
    4: "a transparency mask",
    5: "CMYK",
    8: "CIE L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "raw camera data",
    32844: "LogL",
    32845: "LogLuv",
}


@dataclass(frozen=True, eq=False)
class Plane:
    """The position in the file of the segments of one or several samples.

    Attributes:
        page: tifffile's page.
        first: index of the plane's first segment in the page.
        raw_offset: byte offset of the plane's rows if they are uncompressed and contiguous; None if they are not.
    """

    page: Any
    first: int = 0
    raw_offset: int | None = None


@dataclass(frozen=True, eq=False)
class TiffLevel:
    """A level: its size, the size of its segments (tiles, or strips as wide as the level), and its planes.

    Attributes:
        size: (width, height) of the level, in pixels.
        segment: (width, height) of a segment, in pixels.
        planes: one plane with all samples (chunky), or one per sample.
    """

    size: tuple[int, int]
    segment: tuple[int, int]
    planes: tuple[Plane, ...]

    @property
    def columns(self) -> int:
        """The number of segments along x."""
        return -(-self.size[0] // self.segment[0])


def is_better_in_tifffile(source: Path | RawIOBase) -> bool:
    """Return whether a TIFF has content that OpenSlide would miss: SubIFDs, several series, or a page per colour.

    Args:
        source: the file: its path, or the file object.

    Raises:
        NotRead: its samples are of a kind that neither library reads.
    """
    with tifffile.TiffFile(source) as file:
        page = file.pages.first
        check_sample_format(page)
        if page.subifds:
            return True
        if not (file.is_ome or file.is_qpi):
            return False
        return page.samplesperpixel not in (3, 4) or len(read_ome(page.description)) > 1


def describe_series(series: Sequence[Any], images: Sequence[OmeImage]) -> tuple[str, ...]:
    """Return a line of text for each series: its name, size and kind."""
    lines = []
    for number, one in enumerate(series):
        name = images[number].name if number < len(images) else one.name
        sides = dict(zip(one.axes, one.shape, strict=True))
        rest = ", ".join(f"{axis} {size}" for axis, size in sides.items() if axis not in "XYS")
        channels = f", {sides['S']} samples" if "S" in sides else ""
        lines.append(
            f"{number}: {name or 'unnamed'}, {sides.get('X', 1)} × {sides.get('Y', 1)} px, {one.dtype}{channels}"
            f"{', ' + rest if rest else ''}, {len(one.levels)} {'level' if len(one.levels) == 1 else 'levels'}"
        )
    return tuple(lines)


def levels_of(series: Any, pages: Sequence[Any], image: OmeImage | None) -> tuple[TiffLevel, ...]:
    """Return the levels of a series, the finest first.

    Args:
        series: tifffile's series.
        pages: all pages of the file's main chain; reduced copies among them are levels too.
        image: the series' entry in the OME-XML, or None.

    Raises:
        NotRead: the series is not of a kind that is read.
    """
    if series.kind not in _KINDS_READ:
        raise NotRead(f"a TIFF of a vendor's kind ({series.kind}) that only OpenSlide reads", CONVERT)
    base = _level(series.levels[0], image)
    levels = [base]
    reduced = list(series.levels[1:]) or _reduced_pages(series, pages)
    for one in reduced:
        try:
            level = _level(one, image)
        except (NotRead, ValueError):
            continue  # a coarse level of another kind, or a damaged one, can be left out: finer ones show the same
        if len(level.planes) == len(base.planes) and _same_view(base.size, level.size):
            levels.append(level)
    return tuple(sorted(levels, key=lambda level: -level.size[0]))


def _reduced_pages(series: Any, pages: Sequence[Any]) -> list[_OnePage]:
    """Return the pages of the main chain that are reduced copies of a series of one page."""
    own = series.pages[0]
    if len(series.pages) != 1:
        return []
    found = [_OnePage(page) for page in pages if page.index != own.index and _is_reduced(page)]
    return [one for one in found if one.keyframe.imagewidth < series.keyframe.imagewidth]


def _is_reduced(page: Any) -> bool:
    return bool(getattr(page.keyframe if page.keyframe is not None else page, "is_reduced", False))


class _OnePage:
    """A page with the attributes of a series that are used here."""

    def __init__(self, page: Any) -> None:
        self.pages = [page]
        self.keyframe = page.keyframe
        self.axes, self.shape = page.keyframe.axes, page.keyframe.shape


def _same_view(base: tuple[int, int], level: tuple[int, int]) -> bool:
    """Return whether two sizes have the same aspect ratio, to within 2 px or 2 % of a level's sides."""
    width, height = base[0] * level[1] / base[1], base[1] * level[0] / base[0]
    return abs(width - level[0]) <= max(2, 0.02 * level[0]) or abs(height - level[1]) <= max(2, 0.02 * level[1])


def _level(series: Any, image: OmeImage | None) -> TiffLevel:
    page = series.keyframe
    sides = dict(zip(series.axes, series.shape, strict=True))
    for axis, what in (("Z", "focal planes"), ("T", "points in time")):
        if sides.get(axis, 1) > 1:
            raise NotRead(f"a stack of {sides[axis]} {what}", f"export one of them; {CONVERT}")
    check_sample_format(page)
    _check_compression(page)
    planes = _planes(series, sides, image)
    if page.is_tiled:
        segment = page.tilewidth, page.tilelength
    elif planes[0].raw_offset is not None:
        segment = page.imagewidth, max(1, min(page.imagelength, _RAW_STRIP_PX // page.imagewidth))
    else:
        segment = page.imagewidth, min(page.rowsperstrip, page.imagelength)
    _check_structure(page, segment, planes)
    if segment[0] * segment[1] > _MOST_SEGMENT_PX:
        raise NotRead(f"an image in tiles or strips of {segment[0]} × {segment[1]} px, too large to decode", CONVERT)
    return TiffLevel((page.imagewidth, page.imagelength), segment, planes)


def check_sample_format(page: Any) -> None:
    """Check that samples are integers of 8 or 16 bits.

    Raises:
        NotRead: they are not.
    """
    kinds = {1: "integer", 2: "signed integer", 3: "floating-point", 5: "complex", 6: "complex floating-point"}
    bits, kind = page.bitspersample, int(page.sampleformat)
    if page.dtype not in (np.uint8, np.uint16) or bits not in (8, 16):
        remedy = f"the file is not damaged: scale its values to 8 bits; {CONVERT}"
        raise NotRead(f"an image of {bits}-bit {kinds.get(kind, 'unknown')} samples", remedy)


def _check_structure(page: Any, segment: tuple[int, int], planes: tuple[Plane, ...]) -> None:
    """Refuse sizes of zero, and fewer segments than the image's size calls for."""
    sizes = page.imagewidth, page.imagelength, *segment
    if min(sizes) < 1:
        raise ValueError(f"an image of {sizes[0]} x {sizes[1]} px in segments of {sizes[2]} x {sizes[3]} px")
    per_plane = -(-sizes[0] // sizes[2]) * -(-sizes[1] // sizes[3])
    for plane in planes:
        held = min(len(plane.page.dataoffsets), len(plane.page.databytecounts)) - plane.first
        if plane.raw_offset is None and held < per_plane:
            raise ValueError(f"an image of {per_plane} segments lists {held} of them")


def _check_compression(page: Any) -> None:
    if int(page.compression) not in _COMPRESSIONS:
        name = getattr(page.compression, "name", "unknown")
        raise NotRead(f"a TIFF compressed by a method that is not read ({name}, {int(page.compression)})", CONVERT)


def _planes(series: Any, sides: dict[str, int], image: OmeImage | None) -> tuple[Plane, ...]:
    page = series.keyframe
    samples = page.samplesperpixel
    if samples > _MOST_SAMPLES and int(page.photometric) in (2, 6):
        raise NotRead(f"an image of {samples} samples per pixel", CONVERT)
    if len(series.pages) == 1 and samples >= 3:
        photometric = int(page.photometric)
        jpeg = int(page.compression) in (6, 7, 33007, 34892)
        if photometric == 2 or (photometric == 6 and jpeg):
            return _planes_of_page(page)
        if photometric == 6:
            raise NotRead("an image of YCbCr samples that are not compressed as JPEG", CONVERT)
        if photometric in _NOT_RGB and photometric > 1:
            raise NotRead(f"an image of {_NOT_RGB[photometric]} samples", CONVERT)
    channels = max(sides.get("C", 1), sides.get("S", 1), samples)
    names = [name for name in (image.channels if image is not None else ()) if name]
    if image is not None and image.fluorescence:
        channels = max(channels, 2)
    if channels == 3 and len(series.pages) == 3 and samples == 1 and _order_of(names) is not None:
        pages = [series.pages[number] for number in _order_of(names) or ()]
        if all(one is not None for one in pages):
            return tuple(plane for one in pages for plane in _planes_of_page(one))
    if channels == 3 and len(series.pages) == 1 and samples == 3 and _order_of(names) is not None:
        return _planes_of_page(page)
    called = f" ({', '.join(names[:8])})" if names else ""
    if channels > 1:
        raise NotRead(
            f"a fluorescence or multiplex image of {channels} channels{called}",
            "only brightfield RGB is read: no stain of these channels is what a brightfield model has learnt",
        )
    what = _NOT_RGB.get(int(page.photometric), "one channel")
    raise NotRead(f"an image of one channel{called}, {what}", f"only brightfield RGB is read; {CONVERT}")


def _order_of(names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the indices of the red, green and blue channels; None if their names are not those of colours."""
    if not names:
        return (0, 1, 2)
    first = [name.strip().lower()[:1] for name in names]
    words = {"r", "g", "b", "red", "green", "blue"}
    if sorted(first) != ["b", "g", "r"] or not all(name.strip().lower() in words for name in names):
        return None
    return first.index("r"), first.index("g"), first.index("b")


def _planes_of_page(page: Any) -> tuple[Plane, ...]:
    keyframe = page.keyframe
    samples = keyframe.samplesperpixel
    count = 1 if int(keyframe.planarconfig) == 1 else samples
    raw = None
    if not keyframe.is_tiled and int(keyframe.compression) == 1 and keyframe.bitspersample in (8, 16):
        contiguous = page.is_contiguous and keyframe.fillorder == 1 and keyframe.predictor == 1
        raw = page.dataoffsets[0] if contiguous else None
    per_plane = len(page.dataoffsets) // count
    bytes_per_plane = keyframe.imagewidth * keyframe.imagelength * keyframe.dtype.itemsize
    return tuple(
        Plane(page, number * per_plane, None if raw is None else raw + number * bytes_per_plane)
        for number in range(min(count, 4))  # colours and alpha
    )
