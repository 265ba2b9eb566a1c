"""Overlay: maps of tokens or tiles over the slide's thumbnail, as PNG.

Pixels without a kept token are those of the thumbnail, bit for bit.

Dimension key: (Y, X) thumbnail pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskattn.lettering import wrapped
from maskattn.png_files import write_png
from maskattn.shapes import Float, UInt8
from maskattn.slide.canvas import PaintedMap
from maskattn.slide.colours import (
    COLOUR_MAPS,
    Kind,
    colour_limit,
    colour_limit_of_counted,
    colour_table,
    positions_of,
    strengths_of_colours,
)
from maskattn.slide.legends import draw_colour_bar, draw_scale_bar, draw_text

if TYPE_CHECKING:
    from maskattn.slide.tissue import TissueMask

__all__ = [
    "begin_heatmap",
    "blend",
    "smoothed",
    "write_heatmap",
    "write_mask_overlay",
]

_OPACITY = (0.2, 0.8)  # of a map's zeros, and of its values at the ends of the scale
_BAR_PX = 110
_MOST_BAR_PX = 400
_SCALE_BAR_PX = 52  # the height that it takes with its label
_LINE_PX, _BASELINE_PX = 17, 11
_MARGIN_PX = 6
_TITLE_PT = 9
_MIN_BODY_PX = (420, 240)
_TISSUE_COLOUR = (0, 150, 60)


def blend(
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"] | PaintedMap,
    kind: Kind,
    limits: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "Y X 3"]:
    """Return the thumbnail with a map laid over it; pixels whose value is NaN are those of the thumbnail.

    Args:
        thumbnail_YX3: (Y, X, 3) RGB.
        values_YX: (Y, X) the map, or the same from a canvas.
        kind: the kind of the map.
        limits: the values at the ends of the colour map; None = from the map, by
            :func:`maskattn.slide.colours.colour_limit`.
    """
    import cv2

    limits = limits or _limits_of(values_YX, kind)
    # The thumbnail is grey below the map, so that every hue is the map's and not the stain's.
    grey_YX = cv2.cvtColor(thumbnail_YX3, cv2.COLOR_RGB2GRAY)
    if isinstance(values_YX, PaintedMap):
        unknown, colours = map(values_YX.of_pixels, _colours_of(values_YX.values_V, limits))
    else:
        unknown, colours = _colours_of(values_YX, limits)
    np.bitwise_or(colours, grey_YX, out=colours)
    # Four bytes a pixel are taken several times as fast as three.
    mixed = _mixtures(kind, limits).reshape(-1).take(colours).view(np.uint8).reshape(*grey_YX.shape, 4)
    image: np.ndarray = cv2.cvtColor(mixed, cv2.COLOR_RGBA2RGB)
    cv2.copyTo(thumbnail_YX3, unknown.view(np.uint8), image)
    return image


def _limits_of(values_YX: Float[np.ndarray, "Y X"] | PaintedMap, kind: Kind) -> tuple[float, float]:
    if isinstance(values_YX, PaintedMap):
        return colour_limit_of_counted(values_YX.values_V, values_YX.pixels_V, kind)
    return colour_limit(values_YX, kind)


def _colours_of(values: Float[np.ndarray, " *shape"], limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return where values are not finite, and the row of each value's colour in :func:`_mixtures`, times 256."""
    known = np.isfinite(values)
    positions = np.rint(255 * positions_of(np.where(known, values, np.float32(0)), limits))
    return ~known, positions.astype(np.intp) << 8


def _mixtures(kind: Kind, limits: tuple[float, float]) -> np.ndarray:
    """Return the mixture of each of a map's 256 colours with each of the thumbnail's 256 greys.

    They are (256, 256) uint32, whose bytes in memory are red, green, blue and nothing.
    """
    # Tissue of little relevance shows through.
    least, most = _OPACITY
    opacity = (least + (most - least) * strengths_of_colours(limits))[:, None, None]
    mixed = opacity * colour_table(COLOUR_MAPS[kind][0])[:, None] + (1 - opacity) * np.arange(256)[:, None]
    bytes_of = np.zeros((256, 256, 4), np.uint8)
    np.rint(mixed, out=bytes_of[..., :3], casting="unsafe")
    return bytes_of.view(np.uint32)


def smoothed(values_YX: Float[np.ndarray, "Y X"], sigma_px: float) -> Float[np.ndarray, "Y X"]:
    """Smooth the steps of a map: each pixel becomes a weighted mean of the finite pixels around it; NaN stays NaN.

    Args:
        values_YX: (Y, X) the map.
        sigma_px: standard deviation of the weights, a Gaussian, in pixels.
    """
    import cv2

    known = np.isfinite(values_YX)
    sums, weights = (
        cv2.GaussianBlur(plane.astype(np.float32), (0, 0), max(sigma_px, 0.1), borderType=cv2.BORDER_CONSTANT)
        for plane in (np.where(known, values_YX, 0.0), known)
    )
    drawn = np.full(values_YX.shape, np.nan, np.float32)
    drawn[known] = sums[known] / weights[known]
    return drawn


def begin_heatmap(
    path: Path,
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"] | PaintedMap,
    title: str,
    label: str,
    kind: Kind,
    um_per_px: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Callable[[], None]:
    """Draw what surrounds a map, and return the function that lays it over the thumbnail and writes the picture.

    The picture has a title above the map, and a colour bar and a scale bar at its right. The thumbnail is not
    resampled: it starts below the title at the left edge. The function may be called in another thread, since it
    draws no text; fonts are not safe to share. It raises an OSError if the file cannot be written.

    Args:
        path: the PNG.
        thumbnail_YX3: (Y, X, 3) RGB.
        values_YX: (Y, X) the map, or the same from a canvas; NaN = background, left untouched.
        title: the picture's title; characters that no font of this machine has become question marks.
        label: the quantity that the colour bar measures.
        kind: "diverging" fixes zero in the middle (CDAM), "sequential" starts at zero (attention).
        um_per_px: µm per thumbnail pixel, for the scale bar; None draws no scale bar.
        limits: the values at the ends of the colour map; None = from the map.
    """
    height, width = thumbnail_YX3.shape[:2]
    body = max(width, _MIN_BODY_PX[0]), max(height, _MIN_BODY_PX[1])
    lines = wrapped(title, body[0] + _BAR_PX - 2 * _MARGIN_PX, _TITLE_PT)
    head = 2 * _MARGIN_PX + _LINE_PX * len(lines)
    limits = limits or _limits_of(values_YX, kind)
    image = np.full((head + body[1], body[0] + _BAR_PX, 3), 255, np.uint8)
    for index, line in enumerate(lines):
        draw_text(image, line, _MARGIN_PX, _MARGIN_PX + _BASELINE_PX + _LINE_PX * index, _TITLE_PT)
    strip, bar_px = image[:, body[0] :], min(body[1] - 20 - _SCALE_BAR_PX, _MOST_BAR_PX)
    draw_colour_bar(strip, head + 10, bar_px, limits, COLOUR_MAPS[kind][0], f"{label}; square-root scale")
    if um_per_px is not None:
        draw_scale_bar(strip, head + 10 + bar_px + 20, um_per_px)

    def finish() -> None:
        image[head : head + height, :width] = blend(thumbnail_YX3, values_YX, kind, limits)
        write_png(path, image)

    return finish


def write_heatmap(
    path: Path,
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"],
    title: str,
    label: str,
    kind: Kind,
    um_per_px: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Write the picture of :func:`begin_heatmap` at once.

    Raises:
        OSError: the file cannot be written.
    """
    begin_heatmap(path, thumbnail_YX3, values_YX, title, label, kind, um_per_px, limits)()


def write_mask_overlay(
    path: Path, thumbnail_YX3: UInt8[np.ndarray, "Y X 3"], tissue: TissueMask, width_lv0: int
) -> None:
    """Write the thumbnail with the tissue outlined and tinted; glass stays as it is.

    Args:
        path: the PNG.
        thumbnail_YX3: (Y, X, 3) RGB.
        tissue: the mask.
        width_lv0: the slide's width in level-0 pixels; the thumbnail shows the whole slide.

    Raises:
        OSError: the file cannot be written.
    """
    import cv2

    step = width_lv0 / thumbnail_YX3.shape[1]
    rows, columns = (
        np.minimum(((np.arange(size) + 0.5) * step / px_lv0).astype(np.intp), limit - 1)
        for size, px_lv0, limit in zip(
            thumbnail_YX3.shape[:2], (tissue.px_lv0[1], tissue.px_lv0[0]), tissue.mask_HW.shape, strict=True
        )
    )
    mask = tissue.mask_HW[np.ix_(rows, columns)]
    image = thumbnail_YX3.copy()
    image[mask] = np.rint(0.75 * thumbnail_YX3[mask] + 0.25 * np.array(_TISSUE_COLOUR)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, contours, -1, _TISSUE_COLOUR, 1)
    write_png(path, image)
