"""A map as a picture of numbers: a value per token over all of the slide, and coarser ones to look at from afar.

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

# A quarter of a gigabyte; a slide with more tokens than that has a value per tile.
_MOST_VALUES = 64 << 20


@dataclass(frozen=True, eq=False)
class Mosaic:
    """A map in levels, each half as fine as the one before it.

    Attributes:
        levels: (Y, X) float32 each; NaN where no token takes part, the mean of those that do in a coarser value.
        step_lv0: side of a value of the finest level, in level-0 pixels.
    """

    levels: tuple[Float[np.ndarray, "Y X"], ...]
    step_lv0: float

    @property
    def nbytes(self) -> int:
        """Bytes of all levels."""
        return sum(level.nbytes for level in self.levels)

    def chunk(self, level: int, column: int, row: int, side: int) -> Float[np.ndarray, "s s"]:
        """(side, side) values of a level, those at ``column · side`` and ``row · side`` first; NaN beyond the edge.

        Raises:
            IndexError: there is no such level, or nothing of it is there.
        """
        if not 0 <= level < len(self.levels):
            raise IndexError(f"a level must be 0 to {len(self.levels) - 1}, got {level}")
        values = self.levels[level]
        if not (0 <= column * side < values.shape[1] and 0 <= row * side < values.shape[0]):
            raise IndexError(f"a part must lie in the map, got column {column} and row {row}")
        part = values[row * side : (row + 1) * side, column * side : (column + 1) * side]
        whole = np.full((side, side), np.nan, np.float32)
        whole[: part.shape[0], : part.shape[1]] = part
        return whole


def build_mosaic(table: MapTable, index: int, side: int = 256) -> Mosaic:
    """Lay a map's tiles out over the slide, and halve it until it is no larger than ``side``.

    Args:
        table: the slide's maps.
        index: which; the number of classes is attention.
        side: of the coarsest level, at most.
    """
    h, w = table.tokens_hw or (1, 1)
    rows, columns = math.ceil(table.height_px / table.tile_lv0), math.ceil(table.width_px / table.tile_lv0)
    by_tile = rows * h * columns * w > _MOST_VALUES
    if by_tile:
        h, w = 1, 1
    values = np.full((rows, h, columns, w), np.nan, np.float32)
    cells_T2 = table.coords_T2 // table.tile_lv0
    for some, values_Bhw in table.batches(index):
        if by_tile:
            values_Bhw = mean_of_known(values_Bhw, axes=(1, 2))[:, None, None]
        values[cells_T2[some, 1], :, cells_T2[some, 0], :] = values_Bhw
    levels = [values.reshape(rows * h, columns * w)]
    while max(levels[-1].shape) > side:
        levels.append(halved(levels[-1]))
    return Mosaic(tuple(levels), table.tile_lv0 / h)
