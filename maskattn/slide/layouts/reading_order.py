"""A slide's tiles in the one order in which every run and every training reads them: row by row.

Dimension key: T tiles, H·W cells of the grid.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool
from maskattn.slide.layouts.lattice import grid_cells
from maskattn.slide.layouts.tile_features import TileFeatures

__all__ = ["in_reading_order"]


def in_reading_order(tiles: TileFeatures, needs_grid: bool) -> tuple[TileFeatures, Bool[np.ndarray, "H W"] | None]:
    """The tiles row by row, and the cells of their grid; None where they lie on no lattice.

    Args:
        tiles: in any order.
        needs_grid: whether tiles on no lattice are an error.

    Raises:
        SlideError: they lie on no lattice, and are read by what needs one.
    """
    order = np.lexsort((tiles.coords_T2[:, 0], tiles.coords_T2[:, 1]))
    keep_HW: np.ndarray | None = None
    try:
        rows_T, columns_T, keep_HW = grid_cells(tiles)
        order = np.lexsort((columns_T, rows_T))
    except SlideError:
        if needs_grid:
            raise
    return replace(tiles, coords_T2=tiles.coords_T2[order], features_TC=tiles.features_TC[order]), keep_HW
