"""Assemble a map of a slide as a pyramid of arrays: a value per token over the whole slide, then coarser levels.

Dimension key: (Y, X) tokens of the slide's lattice, (h, w) tokens of a tile, T tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from maskattn.shapes import Float
from maskattn.slide.finished.map_table import MapTable
from maskattn.slide.pyramids.halving import halved, mean_of_known

__all__ = ["Mosaic", "build_mosaic"]

# A quarter of a gigabyte; a slide with more tokens gets one value per tile.
_MOST_VALUES = 64 << 20


@dataclass(frozen=True, eq=False)
class Mosaic:
    """A pyramid of a map, each level at half the resolution of the one before it.

    Attributes:
        levels: (Y, X) float32 arrays, the finest first; NaN where no token is kept. A coarser value is the mean of the
            kept tokens that it covers.
        step_lv0: side of a cell of the finest level, in level-0 pixels.
    """

    levels: tuple[Float[np.ndarray, "Y X"], ...]
    step_lv0: float

    @property
    def nbytes(self) -> int:
        """Bytes that all levels take."""
        return sum(level.nbytes for level in self.levels)

    def chunk(self, level: int, column: int, row: int, side: int) -> Float[np.ndarray, "s s"]:
        """Return the (side, side) chunk of a level at a column and a row of chunks; NaN beyond the level's edge.

        Raises:
            IndexError: the level does not exist, or the chunk lies outside it.
        """
        if not 0 <= level < len(self.levels):
            raise IndexError(f"a level must be 0 to {len(self.levels) - 1}, got {level}")
        values = self.levels[level]
        if not (0 <= column * side < values.shape[1] and 0 <= row * side < values.shape[0]):
            raise IndexError(f"a chunk must lie in the map, got column {column} and row {row}")
        inside = values[row * side : (row + 1) * side, column * side : (column + 1) * side]
        chunk = np.full((side, side), np.nan, np.float32)
        chunk[: inside.shape[0], : inside.shape[1]] = inside
        return chunk


def build_mosaic(table: MapTable, index: int, side: int = 256) -> Mosaic:
    """Place a map's tiles on the slide, and halve the result until it is no larger than ``side``.

    Args:
        table: the slide's maps.
        index: index of the map, 0 to K; K, the number of classes, is attention.
        side: greatest width and height of the coarsest level, in cells.
    """
    h, w = table.tokens_hw or (1, 1)
    rows, columns = math.ceil(table.height_px / table.tile_lv0), math.ceil(table.width_px / table.tile_lv0)
    by_tile = rows * h * columns * w > _MOST_VALUES
    if by_tile:
        h, w = 1, 1
    values = np.full((rows, h, columns, w), np.nan, np.float32)
    cells_T2 = table.coords_T2 // table.tile_lv0
    for batch, values_Bhw in table.batches(index):
        if by_tile:
            values_Bhw = mean_of_known(values_Bhw, axes=(1, 2))[:, None, None]
        values[cells_T2[batch, 1], :, cells_T2[batch, 0], :] = values_Bhw
    levels = [values.reshape(rows * h, columns * w)]
    while max(levels[-1].shape) > side:
        levels.append(halved(levels[-1]))
    return Mosaic(tuple(levels), table.tile_lv0 / h)
