"""Values to colours, for every picture of a map: a square-root scale that keeps zero in the middle of signed maps.

A few tokens hold most of the relevance, and a linear scale would leave all others pale. The viewer's page has the same
scale in ``viewer/assets/colours.js``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from maskattn.shapes import Float, UInt8

__all__ = [
    "COLOUR_MAPS",
    "Kind",
    "colour_limit",
    "colour_scale",
    "colour_table",
    "coloured",
    "kind_of_attention",
    "positions_of",
    "strengths_of",
    "widest",
]

_QUANTILE = 0.001

Kind = Literal["diverging", "sequential"]

# The first of each kind is the heat maps' own; all can be told apart by colour-blind readers.
COLOUR_MAPS: dict[Kind, tuple[str, ...]] = {
    "diverging": ("RdBu_r", "PuOr_r", "BrBG_r"),
    "sequential": ("viridis", "cividis", "magma"),
}


def colour_limit(values_YX: Float[np.ndarray, "Y X"], kind: Kind) -> tuple[float, float]:
    """The values at the ends of the colour map: the 0.1 and 99.9 % quantiles, made symmetric for a diverging map.

    The clipping is for the picture only; the tables keep the raw scores.
    """
    known = values_YX[np.isfinite(values_YX)]
    if not known.size:
        return (-1.0, 1.0) if kind == "diverging" else (0.0, 1.0)
    low, high = (float(value) for value in np.quantile(known, (_QUANTILE, 1 - _QUANTILE)))
    if kind == "diverging":
        return _up_to(max(abs(low), abs(high)) or 1.0, kind)
    return _up_to(high if high > 0 else 1.0, kind)


def kind_of_attention(values: Float[np.ndarray, "*shape"]) -> Kind:
    """How a map of attention is coloured: on both sides of zero where a model's weights are not all above it.

    TransMIL's pseudo-inverse gives such weights, and so does STAMP's ALiBi, where a far tile may count negatively.
    """
    return "diverging" if np.nanmin(values, initial=0.0) < 0 else "sequential"


def widest(limits: Iterable[tuple[float, float]], kind: Kind) -> tuple[float, float]:
    """The limits that serve several maps of a kind at once; see :func:`colour_limit`."""
    return _up_to(max(high for _, high in limits), kind)


def _up_to(high: float, kind: Kind) -> tuple[float, float]:
    return (-high, high) if kind == "diverging" else (0.0, high)


@functools.cache
def colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """(256, 3) RGB of a colour map, from its low end to its high end."""
    import matplotlib

    table: np.ndarray = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return table


def positions_of(values: np.ndarray, limits: tuple[float, float]) -> Float[np.ndarray, " *shape"]:
    """Where values lie on a scale from 0 to 1, by signed square root; what is beyond the limits is at the ends."""
    low, high = _signed_root(np.asarray(limits))
    return np.clip((_signed_root(values) - low) / max(high - low, 1e-30), 0, 1)


def strengths_of(values: np.ndarray, limits: tuple[float, float]) -> Float[np.ndarray, " *shape"]:
    """How far values are from zero on the scale of the colours, from 0 to 1 at its further end."""
    return np.clip(np.sqrt(np.abs(values) / max(max(abs(limit) for limit in limits), 1e-30)), 0, 1)


def coloured(values: np.ndarray, limits: tuple[float, float], name: str) -> UInt8[np.ndarray, "*shape 3"]:
    """The colours of values; those of NaN mean nothing.

    Args:
        values: numbers; those beyond the limits have the colours of the ends.
        limits: the values at the ends of the colour map, of :func:`colour_limit`.
        name: of the colour map, one of :data:`COLOUR_MAPS`.
    """
    positions = np.nan_to_num(positions_of(values, limits), nan=0.5)
    return colour_table(name)[np.rint(255 * positions).astype(np.intp)]


def colour_scale(limits: tuple[float, float]) -> Any:
    """The scale as matplotlib takes it for a colour bar."""
    from matplotlib.colors import FuncNorm

    return FuncNorm((_signed_root, lambda x: np.sign(x) * np.square(x)), *limits)


def _signed_root(values: np.ndarray) -> np.ndarray:
    roots: np.ndarray = np.sign(values) * np.sqrt(np.abs(values))
    return roots
