"""Read regions of slides in level-0 coordinates at any size, from the level that needs the least shrinking.

After a decoding error OpenSlide's handle is unusable, so the reader reopens the file for the next read. It also reopens
the file in another process, where a shared file position would garble what is read.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import UInt8
from maskattn.slide.damage import Damage, DamageLog, Rectangle
from maskattn.slide.formats.image import DecodeError, SlideImage
from maskattn.slide.formats.isolated_image import IsolatedDecoding
from maskattn.slide.formats.opening import open_image
from maskattn.slide.formats.remedies import CONVERT
from maskattn.slide.resampling import blocks, floor_near, on_white, resample
from maskattn.slide.spacing import SlideSpacing, parse_number, resolve_spacing

__all__ = ["SlideInfo", "SlideReader"]

# Pixels of a level decoded at once; larger regions are read in blocks, so that memory does not grow with the slide.
_BLOCK_PX = 16 << 20
# Decoding more than this takes minutes, as would every view of a whole slide without coarse levels.
_MOST_SOURCE_PX = 4 << 30
# A view of the whole slide that took this much decoding is cached, and smaller views are made from it.
_DEAR_SOURCE_PX, _MOST_VIEW_BYTES = 32 << 20, 128 << 20
# The most that a finer level decodes in place of a damaged area of a level: seconds of work.
_MOST_STAND_IN_PX = 16 * _BLOCK_PX
# A level that falls this little short of the requested resolution is preferred to one several times as fine.
_LEVEL_TOLERANCE = 1.01


@dataclass(frozen=True)
class SlideInfo:
    """The geometry, spacing and metadata of a slide.

    Attributes:
        path: the file.
        width_px: width of level 0.
        height_px: height of level 0.
        level_dimensions: (width, height) of each level in its own pixels.
        level_downsamples: level-0 pixels per pixel of each level, along x and along y.
        spacing_um: µm per level-0 pixel.
        spacing_source: the source of the spacing: "override", "manifest" or "metadata".
        vendor: the format, e.g. "aperio" or "ome-tiff"; None if it is not known.
        objective_power: magnification of the objective; None if the file does not state it.
        properties: the file's metadata by name.
        reader: name and version of the library that decodes it, e.g. "openslide 4.0.1".
    """

    path: Path
    width_px: int
    height_px: int
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    spacing_um: float
    spacing_source: str
    vendor: str | None
    objective_power: float | None
    properties: dict[str, str] = field(repr=False)
    reader: str = ""


class SlideReader:
    """A reader of regions of one slide: a context manager that threads can share and that can be pickled for workers.

    Args:
        path: the slide file.
        spacing_um: µm per level-0 pixel; overrides the file's metadata.
        spacing_source: the source of ``spacing_um``: "override" or "manifest".
        series: the index of the series in a TIFF file with several; None takes the largest.
        isolated: decode in a separate process, so that a file that crashes or hangs its decoder does no other harm. A
            pickled copy decodes in its own process, since worker processes are isolated already.

    Raises:
        SlideError: the file is missing, is not a slide, or is of an unsupported kind.

    Example:
        >>> with SlideReader("slide.svs") as reader:  # doctest: +SKIP
        ...     tile = reader.read_region(0, 0, (512, 512), (256, 256))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spacing_um: float | None = None,
        spacing_source: str = "override",
        *,
        series: int | None = None,
        isolated: bool = False,
    ):
        self.path = Path(path)
        self.series = series
        self._spacing_um = spacing_um
        self._spacing_source = spacing_source
        self.damages = DamageLog()
        self._lock = threading.RLock()  # of the open file: one thread reads or closes at a time
        self._image: SlideImage | None = None
        self._pid = -1
        self._view: np.ndarray | None = None
        self._isolation = IsolatedDecoding() if isolated else None
        image = self._open()
        self._level_dimensions = image.level_dimensions
        self._dimensions = image.level_dimensions[0]
        self._downsamples = image.level_downsamples
        self._level_tiles = image.level_tiles
        self._decoder, self._vendor, self._series = image.decoder, image.vendor, image.series
        self._properties, self._associated_images = image.properties, image.associated_images

    @property
    def info(self) -> SlideInfo:
        """The slide's geometry and spacing.

        Raises:
            SlideError: no plausible spacing was given or found.
        """
        spacing = self._spacing()
        return SlideInfo(
            path=self.path,
            width_px=self._dimensions[0],
            height_px=self._dimensions[1],
            level_dimensions=self._level_dimensions,
            level_downsamples=self._downsamples,
            spacing_um=spacing.spacing_um,
            spacing_source=spacing.source,
            vendor=self._vendor,
            objective_power=parse_number(self._objective()),
            properties=dict(self._properties),
            reader=self._decoder,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the areas that could not be decoded so far, and on their replacement."""
        return self.damages.notes()

    def describe(self) -> dict[str, Any]:
        """Return the file's metadata in display order; a slide without a spacing is described too."""
        width, height = self._dimensions
        try:
            spacing = self._spacing()
            spacing_text = f"{spacing.spacing_um:g} µm per level-0 pixel (from {spacing.source})"
            extent = f"{width * spacing.spacing_um / 1000:.2f} × {height * spacing.spacing_um / 1000:.2f} mm"
        except SlideError as error:
            spacing_text, extent = f"unknown: {error}", "unknown"
        return {
            "path": str(self.path),
            "bytes": self.path.stat().st_size,
            "vendor": self._vendor or "unknown",
            "reader": self._decoder,
            "size": f"{width} × {height} px",
            "extent": extent,
            "spacing": spacing_text,
            "objective": self._objective() or "unknown",
            "series": list(self._series),
            "levels": [
                f"{w} × {h} px, downsample {_in_words(downsample)}"
                for (w, h), downsample in zip(self._level_dimensions, self._downsamples, strict=True)
            ],
            "associated images": list(self._associated_images),
            "properties": dict(sorted(self._properties.items())),
        }

    def read_region(
        self, x_lv0: int, y_lv0: int, size_lv0: tuple[int, int], out_px: tuple[int, int], *, tolerant: bool = False
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Read a rectangle of the slide, resampled by area to the requested size.

        Areas outside the slide, or without scanned pixels, are white. If an area of a level cannot be decoded, the
        next finer level is read instead. Memory is bounded whatever the requested size.

        Args:
            x_lv0: left edge in level-0 pixels; may be negative.
            y_lv0: top edge in level-0 pixels; may be negative.
            size_lv0: (width, height) in level-0 pixels.
            out_px: (width, height) of the result.
            tolerant: whether areas that no level can give are white, and listed in :attr:`notes`, instead of raising
                an error; a region of which nothing can be decoded is always an error.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            ValueError: a size is not above 0.
            SlideError: the region cannot be decoded, or would take minutes because the slide lacks coarse levels.
        """
        if min(*size_lv0, *out_px) < 1:
            raise ValueError(
                f"read_region needs sizes above 0, got size_lv0={size_lv0}, out_px={out_px}; "
                "give both as (width, height)"
            )
        full = tolerant and (x_lv0, y_lv0, size_lv0) == (0, 0, self._dimensions)
        if full and self._view is not None and out_px[0] <= self._view.shape[1] and out_px[1] <= self._view.shape[0]:
            return cv2.resize(self._view, out_px, interpolation=cv2.INTER_AREA)
        level = self._level_for(size_lv0[0] / out_px[0], size_lv0[1] / out_px[1])
        source_px = math.prod(size_lv0) / math.prod(self._downsamples[level])
        if source_px > _MOST_SOURCE_PX:
            raise SlideError(
                f"a slide must have coarse levels for large views, got {size_lv0[0]} × {size_lv0[1]} px of "
                f"'{self.path}' for {out_px[0]} × {out_px[1]} px, and no level between; {CONVERT}"
            )
        patience = _Patience(tolerant)
        with self._lock:
            rgb = self._read(level, x_lv0, y_lv0, size_lv0, out_px, patience)
        if patience.first_white is not None and not patience.decoded:
            raise SlideError(patience.first_white.message(self.path))
        if full and source_px > _DEAR_SOURCE_PX and rgb.nbytes <= _MOST_VIEW_BYTES:
            self._view = rgb.copy()
        return rgb

    def thumbnail(self, max_px: int) -> UInt8[np.ndarray, "H W 3"]:
        """Return the whole slide as (H, W, 3) uint8 RGB, whose longer side is ``max_px``, at most that of level 0.

        Areas that cannot be decoded are white, and listed in :attr:`notes`.

        Raises:
            ValueError: ``max_px`` is not above 0.
            SlideError: nothing can be decoded.
        """
        if max_px < 1:
            raise ValueError(f"a thumbnail needs at least one pixel, got max_px={max_px}; 1024 is a good choice")
        width, height = self._dimensions
        shrink = max(width, height) / min(max_px, max(width, height))
        size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
        return self.read_region(0, 0, (width, height), size, tolerant=True)

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            if self._image is not None and self._pid == os.getpid():
                self._image.close()
            self._image = None

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_image": None, "_pid": -1, "_isolation": None, "_view": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _open(self) -> SlideImage:
        if self._image is not None and self._pid == os.getpid():
            return self._image
        opened = open_image if self._isolation is None else self._isolation.open
        image = opened(self.path, self.series)
        self._image, self._pid = image, os.getpid()
        return image

    def _objective(self) -> str | None:
        return self._properties.get("openslide.objective-power") or self._properties.get("ome.objective-power")

    def _spacing(self) -> SlideSpacing:
        return resolve_spacing(self.path, self._properties, self._spacing_um, self._spacing_source, self._dimensions)

    def _level_for(self, scale_x: float, scale_y: float) -> int:
        """Return the coarsest level that is at least as fine as requested along both axes."""
        fit = [
            level
            for level, (x, y) in enumerate(self._downsamples)
            if x <= scale_x * _LEVEL_TOLERANCE and y <= scale_y * _LEVEL_TOLERANCE
        ]
        return max(fit, key=lambda level: math.prod(self._downsamples[level]), default=0)

    def _read(
        self,
        level: int,
        x_lv0: float,
        y_lv0: float,
        size_lv0: tuple[float, float],
        out_px: tuple[int, int],
        patience: _Patience,
    ) -> np.ndarray:
        """Read a rectangle from one level, block by block."""
        scale_x, scale_y = size_lv0[0] / out_px[0], size_lv0[1] / out_px[1]
        step_x, step_y = scale_x / self._downsamples[level][0], scale_y / self._downsamples[level][1]
        finer = [math.ceil(step / _BLOCK_PX**0.5) for step in (step_x, step_y)]
        if max(finer) > 1:  # a single pixel of the result would take more than a block
            fine_px = out_px[0] * finer[0], out_px[1] * finer[1]
            fine = self._read(level, x_lv0, y_lv0, size_lv0, fine_px, patience)
            return cv2.resize(fine, out_px, interpolation=cv2.INTER_AREA)
        rgb = np.full((out_px[1], out_px[0], 3), 255, np.uint8)
        for left, top, right, bottom in blocks(out_px, step_x, step_y, _BLOCK_PX):
            x = x_lv0 + left * scale_x
            y = y_lv0 + top * scale_y
            size = ((right - left) * scale_x, (bottom - top) * scale_y)
            if x >= self._dimensions[0] or y >= self._dimensions[1] or x + size[0] <= 0 or y + size[1] <= 0:
                continue
            block_px = (right - left, bottom - top)
            rgb[top:bottom, left:right] = self._read_block(level, x, y, size, block_px, patience)
        return rgb

    def _read_block(
        self,
        level: int,
        x_lv0: float,
        y_lv0: float,
        size_lv0: tuple[float, float],
        out_px: tuple[int, int],
        patience: _Patience,
    ) -> np.ndarray:
        """Decode the level's pixels that the block touches, and resample exactly the block from them."""
        downsample = self._downsamples[level]
        corner = x_lv0 / downsample[0], y_lv0 / downsample[1]
        extent = size_lv0[0] / downsample[0], size_lv0[1] / downsample[1]
        left, top = floor_near(corner[0]), floor_near(corner[1])
        right, bottom = -floor_near(-(corner[0] + extent[0])), -floor_near(-(corner[1] + extent[1]))
        rgb = self._read_level(level, Rectangle(left, top, right, bottom), patience)
        return resample(rgb, (corner[0] - left, corner[1] - top), extent, out_px)

    def _read_level(self, level: int, asked: Rectangle, patience: _Patience) -> np.ndarray:
        """Return a rectangle of a level in its own pixels, white beyond the level's edges."""
        width, height = self._level_dimensions[level]
        inside = Rectangle(max(asked.left, 0), max(asked.top, 0), min(asked.right, width), min(asked.bottom, height))
        if inside == asked:
            return self._decode(level, inside, patience)
        rgb = np.full((asked.height, asked.width, 3), 255, np.uint8)
        if inside.width > 0 and inside.height > 0:
            rgb[inside.within(asked)] = self._decode(level, inside, patience)
        return rgb

    def _decode(self, level: int, region: Rectangle, patience: _Patience) -> np.ndarray:
        """Decode a rectangle of a level; failures are narrowed down to single tiles, which are replaced."""
        try:
            rgb = on_white(self._open().read(level, region.left, region.top, region.width, region.height))
            patience.decoded = True
            return rgb
        except DecodeError as error:
            self.close()
            reason = str(error)
        halves = region.halves(self._level_tiles[level]) if patience.splits > 0 else None
        if halves is None:
            return self._stand_in(level, region, reason, patience)
        patience.splits -= 1
        rgb = np.empty((region.height, region.width, 3), np.uint8)
        for half in halves:
            rgb[half.within(region)] = self._decode(level, half, patience)
        return rgb

    def _stand_in(self, level: int, region: Rectangle, reason: str, patience: _Patience) -> np.ndarray:
        """Replace a rectangle that cannot be decoded by that of a finer level, or by white if that is tolerated."""
        region_lv0 = region.scaled(*self._downsamples[level])
        damage = Damage(level, region_lv0, reason)
        if level > 0:
            finer = self._downsamples[level - 1]
            size_lv0 = region_lv0.width, region_lv0.height
            if size_lv0[0] / finer[0] * size_lv0[1] / finer[1] <= _MOST_STAND_IN_PX:
                out_px = region.width, region.height
                whites = patience.whites
                rgb = self._read(level - 1, region_lv0.left, region_lv0.top, size_lv0, out_px, patience)
                if patience.whites == whites:
                    self.damages.add(damage, white=False)
                return rgb
        if not patience.tolerant:
            raise SlideError(damage.message(self.path))
        patience.first_white = patience.first_white or damage
        patience.whites += 1
        self.damages.add(damage, white=True)
        return np.full((region.height, region.width, 3), 255, np.uint8)


@dataclass
class _Patience:
    """The remaining effort that one read spends on damaged areas, and its outcome.

    Attributes:
        tolerant: whether areas that no level can give are left white.
        splits: how often a failing rectangle may still be cut in two, to find the tile that fails.
        decoded: whether anything was decoded.
        whites: the number of regions left white.
        first_white: the first of them; None if there are none.
    """

    tolerant: bool
    splits: int = 256
    decoded: bool = False
    whites: int = 0
    first_white: Damage | None = None


def _in_words(downsample: tuple[float, float]) -> str:
    x, y = (f"{ratio:.6g}" for ratio in downsample)
    return x if x == y else f"{x} in x and {y} in y"
