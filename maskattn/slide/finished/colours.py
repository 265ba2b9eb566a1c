"""Values to colours, as the heat maps have them: a square-root scale that keeps zero in the middle of signed maps."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from maskattn.shapes import Float, UInt8

__all__ = ["COLOUR_MAPS", "colour_table", "coloured", "positions_of"]

# The first of each kind is the heat maps' own; all can be told apart by colour-blind readers.
COLOUR_MAPS: dict[Literal["diverging", "sequential"], tuple[str, ...]] = {
    "diverging": ("RdBu_r", "PuOr_r", "BrBG_r"),
    "sequential": ("viridis", "cividis", "magma"),
}


@functools.cache
def colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """(256, 3) RGB of a colour map, from its low end to its high end."""
    import matplotlib

    colours: np.ndarray = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return np.rint(255 * colours).astype(np.uint8)


def positions_of(values: np.ndarray, limits: tuple[float, float]) -> Float[np.ndarray, " *shape"]:
    """Where values lie on a scale from 0 to 1, by signed square root; what is beyond the limits is at the ends."""
    low, high = (np.sign(limit) * np.sqrt(np.abs(limit)) for limit in limits)
    roots = np.sign(values) * np.sqrt(np.abs(values))
    return np.clip((roots - low) / max(high - low, 1e-30), 0, 1)


def coloured(values: np.ndarray, limits: tuple[float, float], name: str) -> UInt8[np.ndarray, "*shape 3"]:
    """The colours of values; those of NaN mean nothing."""
    positions = np.nan_to_num(positions_of(values, limits), nan=0.5)
    return colour_table(name)[np.rint(255 * positions).astype(np.intp)]
