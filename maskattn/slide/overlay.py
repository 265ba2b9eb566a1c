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
from maskattn.shapes import Float, Int, UInt8
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
    image = np.empty_like(thumbnail_YX3, order="C")
    _blend_into(image, thumbnail_YX3, values_YX, kind, limits or _limits_of(values_YX, kind))
    return image


def _blend_into(
    image_YX3: UInt8[np.ndarray, "Y X 3"],
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_YX: Float[np.ndarray, "Y X"] | PaintedMap,
    kind: Kind,
    limits: tuple[float, float],
) -> None:
    """Write :func:`blend` to an image, whose rows may be apart."""
    import cv2

    # The thumbnail is grey below the map, so that every hue is the map's and not the stain's.
    grey_YX = cv2.cvtColor(thumbnail_YX3, cv2.COLOR_RGB2GRAY)
    if isinstance(values_YX, PaintedMap):
        token_YX, colour_V = values_YX.token_YX, _colours_of(values_YX.values_V, limits)
    else:
        token_YX, colour_V = _colours_of(values_YX, limits), np.arange(-1, 256, dtype=np.int32)
        token_YX += 1
    used_C = np.unique(colour_V[colour_V >= 0])
    row_V = np.where(colour_V < 0, -1, np.searchsorted(used_C, colour_V)).astype(np.int32)
    mixtures = _mixtures(kind, limits, used_C)
    _lay_over(np.ascontiguousarray(thumbnail_YX3), grey_YX, token_YX, row_V, mixtures, image_YX3)


def _lay_over(
    picture: np.ndarray, grey: np.ndarray, token: np.ndarray, colour: np.ndarray, mixtures: np.ndarray, out: np.ndarray
) -> None:
    """Compute ``maskattn._native.lay_over``, by numpy if the extension was not built."""
    try:
        from maskattn._native import lay_over
    except ImportError:
        row = colour[token]
        out[:] = picture
        out[row >= 0] = mixtures[row[row >= 0], grey[row >= 0]]
    else:
        lay_over(picture, grey, token, colour, mixtures, out)


def _limits_of(values_YX: Float[np.ndarray, "Y X"] | PaintedMap, kind: Kind) -> tuple[float, float]:
    if isinstance(values_YX, PaintedMap):
        return colour_limit_of_counted(values_YX.values_V, values_YX.pixels_V, kind)
    return colour_limit(values_YX, kind)


def _colours_of(values: Float[np.ndarray, " *shape"], limits: tuple[float, float]) -> Int[np.ndarray, " *shape"]:
    """Return the index of each value's colour among the 256 of a map, int32; −1 where values are not finite."""
    known = np.isfinite(values)
    positions = np.rint(255 * positions_of(np.where(known, values, np.float32(0)), limits))
    return np.where(known, positions, -1).astype(np.int32)


def _mixtures(kind: Kind, limits: tuple[float, float], colours_C: np.ndarray) -> UInt8[np.ndarray, "C 256 3"]:
    """Return the mixture of some of a map's 256 colours with each of the thumbnail's 256 greys."""
    # Tissue of little relevance shows through.
    least, most = _OPACITY
    opacity = (least + (most - least) * strengths_of_colours(limits))[colours_C, None, None]
    mixed = opacity * colour_table(COLOUR_MAPS[kind][0])[colours_C, None] + (1 - opacity) * np.arange(256)[:, None]
    return np.rint(mixed).astype(np.uint8)


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
        _blend_into(image[head : head + height, :width], thumbnail_YX3, values_YX, kind, limits)
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
