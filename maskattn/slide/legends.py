"""The text, colour bar and scale bar of heat maps, drawn in black on white at exact pixel sizes.

They are drawn on arrays, because importing matplotlib and drawing one figure takes longer than all else of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maskattn.lettering import drawn_line, wrapped
from maskattn.shapes import UInt8
from maskattn.slide.colours import colour_table, positions_of

__all__ = ["draw_colour_bar", "draw_scale_bar", "draw_text", "round_length", "tick_labels"]

_LABEL_PT, _TICK_PT = 8, 7
_DPI = 100
_PX_PER_PT = _DPI / 72
_CAPITAL_PER_EM = 0.729  # height of digits and capitals of DejaVu Sans
_LABEL_LINE_PX = 14
_BAR_LEFT_PX, _BAR_RIGHT_PX = 12, 28
_TICK_PX, _GAP_PX = 5, 5
_SCALE_BAR_PX = (86, 5)  # the greatest length, and the height
_TICKS = (0.05, 0.25, 0.5, 1.0)  # as fractions of the scale's end
_SMALLEST_PLAIN, _LARGEST_PLAIN = -2, 3  # powers of ten of tick labels without a common factor lie between

Strip = UInt8[np.ndarray, "Y X 3"]


def draw_text(image: Strip, text: str, x: float, baseline: float, size_pt: float, align: str = "left") -> None:
    """Draw one line of legible text on an image, in place; what lies beyond its edges is cut off.

    Args:
        image: (Y, X, 3) RGB.
        text: the text.
        x: the left end, the centre or the right end of the text, in px.
        baseline: the row of its baseline, in px.
        size_pt: font size in points.
        align: "left", "centre" or "right".
    """
    ink, ascent = drawn_line(text, size_pt, _DPI)
    first, end = _written(ink)
    start = {"left": 0.0, "centre": (first + end) / 2, "right": float(end)}[align]
    _stamp(image, ink, round(x - start), round(baseline) - ascent)


def draw_colour_bar(
    strip: Strip, top: int, height: int, limits: tuple[float, float], colour_map: str, label: str
) -> None:
    """Draw a colour bar with its ticks and label, in place.

    Args:
        strip: (Y, X, 3) RGB, white.
        top: the row of the bar's upper end, in px.
        height: the bar's height in px.
        limits: the values at its ends.
        colour_map: one of :data:`maskattn.slide.colours.COLOUR_MAPS`.
        label: the quantity that it measures.
    """
    left, right = _BAR_LEFT_PX, _BAR_RIGHT_PX
    rising = np.linspace(1, 0, height)
    strip[top : top + height, left:right] = colour_table(colour_map)[np.rint(255 * rising).astype(np.intp)][:, None]
    for row in (top, top + height - 1):
        strip[row, left:right] = 0
    for column in (left, right - 1):
        strip[top : top + height, column] = 0
    shares = [*_TICKS, 0.0, *(-share for share in _TICKS if limits[0] < 0)]
    ticks = np.array(sorted(share * limits[1] for share in shares))
    labels, factor = tick_labels(ticks)
    text_left = right + _TICK_PX + _GAP_PX
    for position, text in zip(positions_of(ticks, limits), labels, strict=True):
        row = top + round((1 - float(position)) * (height - 1))
        strip[row, right : right + _TICK_PX] = 0
        draw_text(strip, text, text_left, row + _CAPITAL_PER_EM * _TICK_PT * _PX_PER_PT / 2, _TICK_PT)
    draw_text(strip, factor, right, top - 5, _TICK_PT, "right")
    ink = strip[top : top + height, text_left:].min(axis=0).min(axis=1) < 255
    label_left = text_left + int(np.flatnonzero(ink)[-1]) + 1 + _GAP_PX
    for index, line in enumerate(wrapped(label, height, _LABEL_PT, _DPI)):
        upright = drawn_line(line, _LABEL_PT, _DPI)[0]
        upright = np.rot90(upright[:, slice(*_written(upright))])
        _stamp(strip, upright, label_left + _LABEL_LINE_PX * index, top + (height - upright.shape[0]) // 2)


def tick_labels(ticks: Sequence[float] | np.ndarray) -> tuple[list[str], str]:
    """Return the labels of ticks with as many decimals as they need, and their common factor, such as "1e−3", or "".

    They are those of matplotlib's ``ScalarFormatter`` for ticks that include 0.
    """
    most = float(np.abs(ticks).max())
    power = math.floor(math.log10(most)) if most else 0
    power = 0 if _SMALLEST_PLAIN < power < _LARGEST_PLAIN else power
    scaled = np.asarray(ticks, np.float64) / 10.0**power
    magnitude = math.floor(math.log10(np.ptp(scaled) or 1.0))
    tolerance = 1e-3 * 10.0**magnitude
    decimals = max(0, 3 - magnitude)
    while decimals >= 0 and np.abs(scaled - np.round(scaled, decimals)).max() < tolerance:
        decimals -= 1
    labels = [f"{tick:.{decimals + 1}f}" for tick in scaled.tolist()]
    factor = f"1e{power}" if power else ""
    return [text.replace("-", "−") for text in labels], factor.replace("-", "−")


def draw_scale_bar(strip: Strip, top: int, um_per_px: float) -> None:
    """Draw a bar of a round length, with the length below it, in the middle of a strip, in place.

    Args:
        strip: (Y, X, 3) RGB, white.
        top: the row above the bar, in px.
        um_per_px: µm per pixel of the picture.
    """
    most, thickness = _SCALE_BAR_PX
    length_um = round_length(most * um_per_px)
    middle, half = strip.shape[1] / 2, length_um / um_per_px / 2
    pixels = np.arange(strip.shape[1])
    covered = np.clip(np.minimum(pixels + 1, middle + half) - np.maximum(pixels, middle - half), 0, 1)
    strip[top + 5 - thickness : top + 5] = np.rint(255 * (1 - covered)).astype(np.uint8)[:, None]
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    draw_text(strip, text, middle, top + 19, _LABEL_PT, "centre")


def round_length(most: float) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that does not exceed a length.

    Example:
        >>> round_length(900.0), round_length(70.0)
        (500.0, 50.0)
    """
    power: float = 10.0 ** np.floor(np.log10(most))
    return max(step * power for step in (1.0, 2.0, 5.0) if step * power <= most * (1 + 1e-9))


def _written(ink: np.ndarray) -> tuple[int, int]:
    """Return the first column with ink, and the one after the last."""
    columns = np.flatnonzero(ink.any(axis=0))
    return (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, 0)


def _stamp(image: np.ndarray, ink: np.ndarray, left: int, top: int) -> None:
    """Darken an image by ink (H, W) whose corner is given, in place."""
    over = slice(max(0, -top), max(0, image.shape[0] - top)), slice(max(0, -left), max(0, image.shape[1] - left))
    ink = ink[over]
    top, left = max(0, top), max(0, left)
    area = image[top : top + ink.shape[0], left : left + ink.shape[1]]
    darkest = np.repeat(255 - ink, 3, axis=1).reshape(area.shape)  # compared several times as fast as one channel
    np.minimum(area, darkest, out=area)
