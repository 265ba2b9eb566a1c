"""Sort a slide's tiles row by row, the order in which every run and every training reads them.

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
    """Return the tiles sorted row by row, and (H, W) bool, the cells of their grid, or None if they are on no lattice.

    Args:
        tiles: the tiles, in any order.
        needs_grid: raise an error if the tiles are not on one lattice.

    Raises:
        SlideError: the tiles are not on one lattice, and ``needs_grid`` is True.
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
