"""Reading slides: regions in level-0 coordinates at any size, from the level that needs the least shrinking.

After a decoding error OpenSlide's handle is dead, so the reader reopens the file for the next read; it also reopens in
another process, where a shared file position would garble what is read.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import openslide

from maskattn.errors import SlideError
from maskattn.shapes import UInt8
from maskattn.slide.formats.image import DecodeError, SlideImage
from maskattn.slide.formats.openslide_image import OpenSlideImage
from maskattn.slide.spacing import SlideSpacing, parse_number, resolve_spacing

__all__ = ["SlideInfo", "SlideReader"]

# Pixels of a level decoded at once; larger regions are read in blocks, so that memory does not grow with the slide.
_BLOCK_PX = 16 << 20
# A level that falls short of the asked resolution by this little is taken rather than one several times as fine.
_LEVEL_TOLERANCE = 1.01


@dataclass(frozen=True)
class SlideInfo:
    """What is known of a slide once its spacing is settled.

    Attributes:
        path: the file.
        width_px: width of level 0.
        height_px: height of level 0.
        level_dimensions: (width, height) of each level in its own pixels.
        level_downsamples: level-0 pixels per pixel of each level, along x and along y.
        spacing_um: µm per level-0 pixel.
        spacing_source: where the spacing came from: "override", "manifest" or "metadata".
        vendor: OpenSlide's name of the format, e.g. "aperio".
        objective_power: magnification of the objective, where the file gives it.
        properties: everything the file says of itself.
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


class SlideReader:
    """Reads regions of one slide; a context manager, and safe to pickle into worker processes.

    Args:
        path: the slide file.
        spacing_um: µm per level-0 pixel, in place of what the file says.
        spacing_source: who gave ``spacing_um``: "override" or "manifest".

    Raises:
        SlideError: the file is missing, is not a slide, or OpenSlide cannot open it.

    Example:
        >>> with SlideReader("slide.svs") as reader:  # doctest: +SKIP
        ...     tile = reader.read_region(0, 0, (512, 512), (256, 256))
    """

    def __init__(self, path: str | os.PathLike[str], spacing_um: float | None = None, spacing_source: str = "override"):
        self.path = Path(path)
        self._spacing_um = spacing_um
        self._spacing_source = spacing_source
        self._image: SlideImage | None = None
        self._pid = -1
        image = self._open()
        self._level_dimensions = image.level_dimensions
        self._dimensions = image.level_dimensions[0]
        self._downsamples = image.level_downsamples
        self._properties = image.properties
        self._associated_images = image.associated_images

    @property
    def info(self) -> SlideInfo:
        """The slide's geometry and spacing.

        Raises:
            SlideError: no plausible spacing was given or found.
        """
        spacing = self._spacing()
        power = self._properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
        return SlideInfo(
            path=self.path,
            width_px=self._dimensions[0],
            height_px=self._dimensions[1],
            level_dimensions=self._level_dimensions,
            level_downsamples=self._downsamples,
            spacing_um=spacing.spacing_um,
            spacing_source=spacing.source,
            vendor=self._properties.get(openslide.PROPERTY_NAME_VENDOR),
            objective_power=parse_number(power),
            properties=dict(self._properties),
        )

    def describe(self) -> dict[str, Any]:
        """What the file says of itself, in the order to show it; works without a spacing."""
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
            "vendor": self._properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
            "size": f"{width} × {height} px",
            "extent": extent,
            "spacing": spacing_text,
            "objective": self._properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, "unknown"),
            "levels": [
                f"{w} × {h} px, downsample {_in_words(downsample)}"
                for (w, h), downsample in zip(self._level_dimensions, self._downsamples, strict=True)
            ],
            "associated images": list(self._associated_images),
            "properties": dict(sorted(self._properties.items())),
        }

    def read_region(
        self, x_lv0: int, y_lv0: int, size_lv0: tuple[int, int], out_px: tuple[int, int]
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Read a rectangle of the slide, resampled by area to the asked size.

        What lies outside the slide, or has no scanned pixels, is white. Memory is bounded whatever the size asked.

        Args:
            x_lv0: left edge in level-0 pixels; may be negative.
            y_lv0: top edge in level-0 pixels; may be negative.
            size_lv0: (width, height) in level-0 pixels.
            out_px: (width, height) of the result.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            ValueError: a size is not above 0.
            SlideError: the region cannot be decoded; the next read reopens the file.
        """
        if min(*size_lv0, *out_px) < 1:
            raise ValueError(
                f"read_region needs sizes above 0, got size_lv0={size_lv0}, out_px={out_px}; "
                "give both as (width, height)"
            )
        scale_x, scale_y = size_lv0[0] / out_px[0], size_lv0[1] / out_px[1]
        level = self._level_for(scale_x, scale_y)
        step_x, step_y = scale_x / self._downsamples[level][0], scale_y / self._downsamples[level][1]
        finer = [math.ceil(step / _BLOCK_PX**0.5) for step in (step_x, step_y)]
        if max(finer) > 1:  # a single pixel of the result would take more than a block
            fine = self.read_region(x_lv0, y_lv0, size_lv0, (out_px[0] * finer[0], out_px[1] * finer[1]))
            return cv2.resize(fine, out_px, interpolation=cv2.INTER_AREA)
        rgb = np.full((out_px[1], out_px[0], 3), 255, np.uint8)
        for left, top, right, bottom in _blocks(out_px, step_x, step_y):
            x = x_lv0 + left * scale_x
            y = y_lv0 + top * scale_y
            size = ((right - left) * scale_x, (bottom - top) * scale_y)
            if x >= self._dimensions[0] or y >= self._dimensions[1] or x + size[0] <= 0 or y + size[1] <= 0:
                continue
            rgb[top:bottom, left:right] = self._read_block(level, x, y, size, (right - left, bottom - top))
        return rgb

    def thumbnail(self, max_px: int) -> UInt8[np.ndarray, "H W 3"]:
        """The whole slide, (H, W, 3) uint8 RGB, its longer side ``max_px`` or, if that is less, as long as level 0."""
        if max_px < 1:
            raise ValueError(f"a thumbnail needs at least one pixel, got max_px={max_px}; 1024 serves well")
        width, height = self._dimensions
        shrink = max(width, height) / min(max_px, max(width, height))
        size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
        return self.read_region(0, 0, (width, height), size)

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._image is not None and self._pid == os.getpid():
            self._image.close()
        self._image = None

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_image": None, "_pid": -1}

    def _open(self) -> SlideImage:
        if self._image is not None and self._pid == os.getpid():
            return self._image
        if not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no file"
            raise SlideError(f"a slide must be a file, got path='{self.path}', which is {what}; check the path")
        try:
            image = OpenSlideImage(self.path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideError(
                f"a slide must be in a format that OpenSlide reads, got path='{self.path}', which it does not know; "
                "check that the file is complete, or convert it to a tiled pyramidal TIFF"
            ) from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(
                f"a slide must open in OpenSlide, got path='{self.path}', which fails with '{error}'; "
                "check that the file is complete and readable, or convert it to a tiled pyramidal TIFF"
            ) from error
        self._image, self._pid = image, os.getpid()
        return image

    def _spacing(self) -> SlideSpacing:
        return resolve_spacing(self.path, self._properties, self._spacing_um, self._spacing_source)

    def _level_for(self, scale_x: float, scale_y: float) -> int:
        """The coarsest level that is at least as fine as asked along both axes."""
        fit = [
            level
            for level, (x, y) in enumerate(self._downsamples)
            if x <= scale_x * _LEVEL_TOLERANCE and y <= scale_y * _LEVEL_TOLERANCE
        ]
        return max(fit, key=lambda level: math.prod(self._downsamples[level]), default=0)

    def _read_block(
        self, level: int, x_lv0: float, y_lv0: float, size_lv0: tuple[float, float], out_px: tuple[int, int]
    ) -> np.ndarray:
        """Decode the whole level pixels around the block, then resample exactly the block out of them."""
        downsample = self._downsamples[level]
        corner = x_lv0 / downsample[0], y_lv0 / downsample[1]
        extent = size_lv0[0] / downsample[0], size_lv0[1] / downsample[1]
        left, top = _floor(corner[0]), _floor(corner[1])
        right, bottom = -_floor(-(corner[0] + extent[0])), -_floor(-(corner[1] + extent[1]))
        rgb = self._read_level(level, left, top, right, bottom)
        return _resample(rgb, (corner[0] - left, corner[1] - top), extent, out_px)

    def _read_level(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """A rectangle of a level in its own pixels, on white."""
        width, height = self._level_dimensions[level]
        inside = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if inside == (left, top, right, bottom):
            return self._decode(level, *inside)
        rgb = np.full((bottom - top, right - left, 3), 255, np.uint8)
        if inside[0] < inside[2] and inside[1] < inside[3]:
            rgb[inside[1] - top : inside[3] - top, inside[0] - left : inside[2] - left] = self._decode(level, *inside)
        return rgb

    def _decode(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        try:
            return _on_white(self._open().read(level, left, top, right - left, bottom - top))
        except DecodeError as error:
            self.close()
            place = round(left * self._downsamples[level][0]), round(top * self._downsamples[level][1])
            raise SlideError(
                f"a region must decode, got x={place[0]}, y={place[1]} at level {level} of '{self.path}', which "
                f"fails with '{error}'; the file is damaged there: copy it again, or rescan the slide"
            ) from error


def _in_words(downsample: tuple[float, float]) -> str:
    x, y = (f"{ratio:.6g}" for ratio in downsample)
    return x if x == y else f"{x} in x and {y} in y"


def _floor(position: float) -> int:
    """Floor that takes a position within rounding of a whole pixel as that pixel."""
    nearest = round(position)
    return nearest if abs(position - nearest) < 1e-6 else math.floor(position)


def _blocks(out_px: tuple[int, int], scale_x: float, scale_y: float) -> list[tuple[int, int, int, int]]:
    """Cut an output of ``out_px`` into (left, top, right, bottom) whose sources hold at most _BLOCK_PX pixels."""
    if out_px[0] * scale_x * out_px[1] * scale_y <= _BLOCK_PX:
        return [(0, 0, *out_px)]
    side = _BLOCK_PX**0.5
    step_x, step_y = max(1, int(side / scale_x)), max(1, int(side / scale_y))
    return [
        (left, top, min(left + step_x, out_px[0]), min(top + step_y, out_px[1]))
        for top in range(0, out_px[1], step_y)
        for left in range(0, out_px[0], step_x)
    ]


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Lay (H, W, 4) RGBA on white: (H, W, 3) RGB; what has no alpha stays as it is."""
    if rgba.shape[2] == 3:
        return rgba
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return rgb
    weight = alpha[..., None].astype(np.uint16)
    blended: np.ndarray = ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    return blended


def _resample(
    rgb: np.ndarray, offset: tuple[float, float], extent: tuple[float, float], out_px: tuple[int, int]
) -> np.ndarray:
    """Resample by area the rectangle at ``offset`` of ``extent`` (x, y; pixels of ``rgb``) to ``out_px``."""
    whole = (max(1, round(extent[0])), max(1, round(extent[1])))
    if any(abs(o) > 1e-3 for o in offset) or any(abs(e - w) > 1e-3 for e, w in zip(extent, whole, strict=True)):
        # Shift by less than a pixel onto whole pixels first: area resampling starts at a pixel's edge.
        scale = extent[0] / whole[0], extent[1] / whole[1]
        shift = [
            [scale[0], 0.0, offset[0] + 0.5 * scale[0] - 0.5],
            [0.0, scale[1], offset[1] + 0.5 * scale[1] - 0.5],
        ]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        rgb = cv2.warpAffine(rgb, np.array(shift), whole, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if whole == out_px:
        return rgb[: whole[1], : whole[0]]
    shrinks = whole[0] >= out_px[0] and whole[1] >= out_px[1]
    resized: np.ndarray = cv2.resize(
        rgb[: whole[1], : whole[0]], out_px, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized
