"""From coordinates to a grid: the row and column of each tile, where the tiles lie on one square lattice.

The step of the lattice is fitted to the coordinates, as µm rounded to pixels (STAMP) make a step that is not whole.
CLAM lays a lattice of its own into each piece of tissue: then there is no grid, and that is said.

Dimension key: T tiles; H, W cells of the grid.
"""

from __future__ import annotations

import math

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Int
from maskattn.slide.layouts.tile_features import TileCoords
from maskattn.slide.names import as_text

__all__ = ["grid_cells"]

# Both ends of a step were rounded to whole pixels.
_OFF_PX = 1.0
_MOST_CELLS = 20_000_000


def grid_cells(
    tiles: TileCoords,
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"], Bool[np.ndarray, "H W"]]:
    """The place of each tile in the grid that all of them lie on.

    Args:
        tiles: where the tiles lie; their order is kept.

    Returns:
        (T,) rows, (T,) columns, and (H, W) bool, which cells have a tile. The grid starts in the slide's corner and
        ends with the slide, or with the last tile where the slide's size is not known.

    Raises:
        SlideError: the tiles do not lie on one lattice, or several on one cell of it.
    """
    coords_T2 = tiles.coords_T2
    if not len(coords_T2):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.zeros((0, 0), bool)
    step = _step(tiles)
    origins, steps = zip(*(_fit(coords_T2[:, axis], step) for axis in (0, 1)), strict=True)
    cells_T2 = np.stack([np.rint((coords_T2[:, axis] - origins[axis]) / steps[axis]) for axis in (0, 1)], axis=1)
    off_T2 = np.abs(coords_T2 - (cells_T2 * steps + np.array(origins)))
    if (off_T2 > _OFF_PX).any():
        stray = int(np.argmax(off_T2.max(axis=1)))
        x, y = coords_T2[stray]
        raise SlideError(
            f"tiles must lie on one lattice to have rows and columns, got the tile at x={x}, y={y}, "
            f"{off_T2.max():.0f} px off the lattice of {step:g} px, in {as_text(tiles.source)}; CLAM lays a lattice "
            "into each piece of tissue: write coordinates of one grid, or take a model that needs no grid"
        )
    # Whole cells of the lattice may lie between the slide's corner and the first tile.
    cells_T2 = cells_T2.astype(np.int64)
    first = np.array(
        [math.floor(origin / width + _OFF_PX / width) for origin, width in zip(origins, steps, strict=True)]
    )
    corner = np.array(origins) - first * steps
    cells_T2 += first
    shape = cells_T2.max(axis=0) + 1
    if tiles.on_level0 and tiles.width_px is not None and tiles.height_px is not None:
        size = np.array([tiles.width_px, tiles.height_px])
        shape = np.maximum(shape, np.ceil((size - corner) / steps - _OFF_PX / step).astype(np.int64))
    if np.prod(shape, dtype=float) > _MOST_CELLS:
        raise SlideError(
            f"a grid may have up to {_MOST_CELLS:,} cells, got {shape[1]:,} × {shape[0]:,} for tiles of {step:g} px in "
            f"{as_text(tiles.source)}; check that the coordinates are level-0 pixels"
        )
    keep_HW = np.zeros((shape[1], shape[0]), bool)
    keep_HW[cells_T2[:, 1], cells_T2[:, 0]] = True
    if np.count_nonzero(keep_HW) < len(cells_T2):
        raise SlideError(
            f"each cell of the grid may have one tile, got {len(cells_T2):,} tiles on {np.count_nonzero(keep_HW):,} "
            f"cells in {as_text(tiles.source)}; leave out tiles that come twice"
        )
    return cells_T2[:, 1], cells_T2[:, 0], keep_HW


def _step(tiles: TileCoords) -> float:
    """About what lies between neighbouring tiles: from their size and overlap, or else from the coordinates."""
    if tiles.patch_size_lv0 is not None and tiles.overlap_lv0 is not None and tiles.patch_size_lv0 > tiles.overlap_lv0:
        return float(tiles.patch_size_lv0 - tiles.overlap_lv0)
    steps = np.concatenate([np.diff(np.unique(tiles.coords_T2[:, axis])) for axis in (0, 1)])
    return float(steps.min()) if len(steps) else 1.0


def _fit(positions_T: np.ndarray, step: float) -> tuple[float, float]:
    """Origin and step of the lattice that positions along an axis lie on, by least squares from an estimated step."""
    places = np.unique(positions_T).astype(np.float64)
    # Counted from gap to gap, an error of the estimate does not add up along the slide.
    index = np.concatenate([[0.0], np.cumsum(np.rint(np.diff(places) / step))])
    if len(places) < 2 or index[-1] == 0:
        return float(places[0]), step
    fitted, origin = np.polyfit(index, places, 1)
    # Where the step is whole, the fit finds it but for rounding.
    if np.abs(places - (places[0] + index * round(fitted))).max() == 0:
        return float(places[0]), float(round(fitted))
    return float(origin), float(fitted)
