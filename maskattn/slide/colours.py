"""The colours of all pictures of maps, on a square-root scale that keeps zero in the middle of signed maps.

A few tokens hold most of the relevance, and a linear scale would leave all others pale. The viewer's page implements
the same scale in ``viewer/assets/colours.js``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from maskattn.shapes import Float, Int, UInt8

__all__ = [
    "COLOUR_MAPS",
    "Kind",
    "colour_limit",
    "colour_limit_of_counted",
    "colour_table",
    "coloured",
    "kind_of_attention",
    "positions_of",
    "strengths_of",
    "strengths_of_colours",
    "widest",
]

_QUANTILE = 0.001

Kind = Literal["diverging", "sequential"]
_NOTHING_KNOWN: dict[Kind, tuple[float, float]] = {"diverging": (-1.0, 1.0), "sequential": (0.0, 1.0)}

# Heat maps use the first of each kind; all are safe for colour-blind readers.
COLOUR_MAPS: dict[Kind, tuple[str, ...]] = {
    "diverging": ("RdBu_r", "PuOr_r", "BrBG_r"),
    "sequential": ("viridis", "cividis", "magma"),
}
# The diverging maps of 11 colours by Cynthia Brewer (colorbrewer2.org), from their high end to their low end. They and
# OpenCV's tables, which give the sequential maps, are those of matplotlib, whose import takes longer than a picture.
_BREWER = {
    "RdBu_r": "67001f b2182b d6604d f4a582 fddbc7 f7f7f7 d1e5f0 92c5de 4393c3 2166ac 053061",
    "PuOr_r": "7f3b08 b35806 e08214 fdb863 fee0b6 f7f7f7 d8daeb b2abd2 8073ac 542788 2d004b",
    "BrBG_r": "543005 8c510a bf812d dfc27d f6e8c3 f5f5f5 c7eae5 80cdc1 35978f 01665e 003c30",
}


def colour_limit(values_YX: Float[np.ndarray, "Y X"], kind: Kind) -> tuple[float, float]:
    """Return the values at the ends of the colour map: the 0.1 and 99.9 % quantiles, symmetric for a diverging map.

    A sequential map starts at 0. The limits clip the picture only; the tables keep the raw scores.
    """
    known = values_YX[np.isfinite(values_YX)]
    if not known.size:
        return _NOTHING_KNOWN[kind]
    low, high = (float(value) for value in np.quantile(known, (_QUANTILE, 1 - _QUANTILE)))
    return _limit_of_quantiles(low, high, kind)


def colour_limit_of_counted(
    values_V: Float[np.ndarray, " V"], pixels_V: Int[np.ndarray, " V"], kind: Kind
) -> tuple[float, float]:
    """Return :func:`colour_limit` of a map in which each value occurs a given number of times.

    Args:
        values_V: (V,) values.
        pixels_V: (V,) how often each occurs.
        kind: the kind of the map.
    """
    known = np.isfinite(values_V) & (pixels_V > 0)
    if not known.any():
        return _NOTHING_KNOWN[kind]
    values, pixels = values_V[known], pixels_V[known]
    order = np.argsort(values)
    values, ends = values[order], np.cumsum(pixels[order])

    def quantile(share: float) -> float:
        """Interpolate between the two pixels next to the quantile, in the order of numpy's arithmetic."""
        position = (ends[-1] - 1) * share
        below = math.floor(position)
        beyond = position - below
        low, high = values[np.searchsorted(ends, (below, min(below + 1, ends[-1] - 1)), side="right")]
        step = np.float64(high - low)
        return float(low + step * beyond if beyond < 0.5 else high - step * (1 - beyond))

    return _limit_of_quantiles(quantile(_QUANTILE), quantile(1 - _QUANTILE), kind)


def _limit_of_quantiles(low: float, high: float, kind: Kind) -> tuple[float, float]:
    if kind == "diverging":
        return _up_to(max(abs(low), abs(high)) or 1.0, kind)
    return _up_to(high if high > 0 else 1.0, kind)


def kind_of_attention(values: Float[np.ndarray, "*shape"]) -> Kind:
    """Return the kind of a map of attention: diverging if some weights are negative, else sequential.

    TransMIL's pseudo-inverse gives negative weights, and so does STAMP's ALiBi, in which a distant tile may count
    negatively.
    """
    return "diverging" if np.nanmin(values, initial=0.0) < 0 else "sequential"


def widest(limits: Iterable[tuple[float, float]], kind: Kind) -> tuple[float, float]:
    """Return the widest of several maps' limits, which suits all of them; see :func:`colour_limit`."""
    return _up_to(max(high for _, high in limits), kind)


def _up_to(high: float, kind: Kind) -> tuple[float, float]:
    return (-high, high) if kind == "diverging" else (0.0, high)


@functools.cache
def colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """Return a colour map as (256, 3) RGB, from its low end to its high end."""
    if name in _BREWER:
        low_to_high = np.array([tuple(bytes.fromhex(colour)) for colour in _BREWER[name].split()][::-1]).T
        steps = np.linspace(0, 1, 256), np.linspace(0, 1, low_to_high.shape[1])
        return np.stack([np.interp(*steps, channel) for channel in low_to_high], axis=1).astype(np.uint8)
    import cv2

    ramp = np.arange(256, dtype=np.uint8)[None]
    table: np.ndarray = cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{name.upper()}"))[0, :, ::-1]
    return table


def positions_of(values: np.ndarray, limits: tuple[float, float]) -> Float[np.ndarray, " *shape"]:
    """Return the positions of values on the scale, 0 to 1, by signed square root and clipped at the limits."""
    low, high = _signed_root(np.asarray(limits)).tolist()  # Python's numbers leave float32 as it is
    return np.clip((_signed_root(values) - low) / max(high - low, 1e-30), 0, 1)


def strengths_of(values: np.ndarray, limits: tuple[float, float]) -> Float[np.ndarray, " *shape"]:
    """Return how far values are from zero on the colours' scale, 0 to 1, which is the limit further from zero."""
    return np.clip(np.sqrt(np.abs(values) / max(max(abs(limit) for limit in limits), 1e-30)), 0, 1)


def strengths_of_colours(limits: tuple[float, float]) -> Float[np.ndarray, " 256"]:
    """Return :func:`strengths_of` the values to which the 256 colours of a map belong."""
    low, high = _signed_root(np.asarray(limits)).tolist()
    roots = np.linspace(low, high, 256)
    return strengths_of(np.copysign(roots**2, roots), limits)


def coloured(values: np.ndarray, limits: tuple[float, float], name: str) -> UInt8[np.ndarray, "*shape 3"]:
    """Return the colours of values; those of NaN are meaningless.

    Args:
        values: numbers; those beyond the limits get the colours of the ends.
        limits: the values at the ends of the colour map, from :func:`colour_limit`.
        name: the colour map, one of :data:`COLOUR_MAPS`.
    """
    positions = np.nan_to_num(positions_of(values, limits), nan=0.5)
    return np.take(colour_table(name), np.rint(255 * positions).astype(np.uint8), axis=0)


def _signed_root(values: np.ndarray) -> np.ndarray:
    roots: np.ndarray = np.copysign(np.sqrt(np.abs(values)), values)
    return roots
