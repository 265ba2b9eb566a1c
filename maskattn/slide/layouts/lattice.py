"""Find the row and column of each tile, if all tiles are on one lattice.

The step of the lattice is fitted to the coordinates, because µm rounded to pixels (STAMP) give a fractional step. CLAM
uses a separate lattice for each piece of tissue: then there is no common grid, which is an error.

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
    """Return the row and column of each tile in a grid of the whole slide.

    Args:
        tiles: the tiles, in any order, which is kept.

    Returns:
        (T,) rows, (T,) columns, and (H, W) bool, True for cells with a tile. The grid starts at the slide's corner and
        ends with the slide, or with the last tile if the slide's size is not known.

    Raises:
        SlideError: the tiles are not on one lattice, several are in one cell, or the grid would be too large.
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
            f"{off_T2.max():.0f} px off the lattice of {step:g} px, in {as_text(tiles.source)}; CLAM uses a lattice "
            "for each piece of tissue: write coordinates of one grid, or take a model that needs no grid"
        )
    # There may be empty cells between the slide's corner and the first tile.
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
    """Estimate the step between neighbouring tiles from their size and overlap, or else from the coordinates."""
    if tiles.patch_size_lv0 is not None and tiles.overlap_lv0 is not None and tiles.patch_size_lv0 > tiles.overlap_lv0:
        return float(tiles.patch_size_lv0 - tiles.overlap_lv0)
    steps = np.concatenate([np.diff(np.unique(tiles.coords_T2[:, axis])) for axis in (0, 1)])
    return float(steps.min()) if len(steps) else 1.0


def _fit(positions_T: np.ndarray, step: float) -> tuple[float, float]:
    """Fit the origin and the step of a lattice to positions along an axis, by least squares from an estimated step."""
    distinct = np.unique(positions_T).astype(np.float64)
    # Steps are counted gap by gap, so that an error of the estimate does not add up along the slide.
    index = np.concatenate([[0.0], np.cumsum(np.rint(np.diff(distinct) / step))])
    if len(distinct) < 2 or index[-1] == 0:
        return float(distinct[0]), step
    fitted, origin = np.polyfit(index, distinct, 1)
    # An integer step is fitted up to rounding, so it is taken exactly if it explains all positions.
    if np.abs(distinct - (distinct[0] + index * round(fitted))).max() == 0:
        return float(distinct[0]), float(round(fitted))
    return float(origin), float(fitted)
