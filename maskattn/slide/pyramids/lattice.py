"""Maps over the lattice of a slide's tokens, and the levels of their pyramids, block by block.

Level l has one pixel for 2^l × 2^l pixels of level 0. A pixel no larger than a cell of the lattice has the value of the
cell at its centre; a larger one has the mean of the four pixels of the next finer level. Only the lattice is kept, in
an unnamed temporary file, and the coarser levels of one map: memory does not grow with the slide's pixels.

A cell is a token if the tokens of all tiles form one lattice. Otherwise its side is the greatest common divisor of the
tiles' positions and size, but at least a sixteenth of a token. Where tiles overlap, the last one painted is shown.

Dimension key: M maps, (R, C) the slide's cells, T tiles of a slide, B of a batch, (h, w) tokens of a tile, (Y, X) a
level's pixels.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maskattn.shapes import Bool, Float, Int
from maskattn.slide.grid import TokenGrid
from maskattn.slide.pyramids.halving import halved

__all__ = ["BLOCK_PX", "MapLattice"]

BLOCK_PX = 512
_BAND_PX = 256
_MOST_CELLS = 16  # along a token's side


class MapLattice:
    """Maps at the resolution of tokens; NaN where none is kept.

    Args:
        maps: M, the number of maps.
        grid: the slide's token grid.
        coords_T2: (T, 2) level-0 x, y of the top left corners of all tiles that will be painted.
        folder: the folder in whose file system the temporary file is made.
    """

    def __init__(self, maps: int, grid: TokenGrid, coords_T2: Int[np.ndarray, "T 2"], folder: Path) -> None:
        self.cell_lv0 = _cell_lv0(grid, coords_T2)
        self.slide_px = grid.height_px, grid.width_px
        self._cells_of_tile = max(1, round(grid.tile_lv0 / self.cell_lv0))
        rows, columns = (max(1, math.ceil(length / self.cell_lv0)) for length in self.slide_px)
        # The operating system caches as much of the file as memory allows.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- lives as long as the lattice
        self.values_MRC: Float[np.ndarray, "M R C"] = np.memmap(
            self._file, np.float32, "w+", shape=(maps, rows, columns)
        )
        for row in range(0, rows, _BAND_PX):
            self.values_MRC[:, row : row + _BAND_PX] = np.nan

    def close(self) -> None:
        """Delete the temporary file."""
        del self.values_MRC
        self._file.close()

    def paint(
        self,
        coords_B2: Int[np.ndarray, "B 2"],
        values_MBhw: Float[np.ndarray, "M B h w"],
        keep_Bhw: Bool[np.ndarray, "B h w"],
    ) -> None:
        """Paint the kept tokens of tiles; arguments as for :meth:`maskattn.slide.canvas.MapCanvas.paint`."""
        values_MBhw = np.broadcast_to(values_MBhw, (len(values_MBhw), *keep_Bhw.shape))
        _, rows, columns = self.values_MRC.shape
        cell = np.arange(self._cells_of_tile) + 0.5
        token = np.ix_(*((cell * tokens / self._cells_of_tile).astype(np.intp) for tokens in keep_Bhw.shape[1:]))
        for tile, corner in enumerate(coords_B2):
            column, row = (round(float(at) / self.cell_lv0) for at in corner)
            kept = keep_Bhw[tile][token][: rows - row, : columns - column]
            height, width = kept.shape
            for target, source in zip(self.values_MRC, values_MBhw[:, tile], strict=True):
                window = target[row : row + height, column : column + width]
                np.copyto(window, source[token][:height, :width], where=kept)

    def level_shapes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of every level, down to the first that fits into a block."""
        shapes = [self.slide_px]
        while max(shapes[-1]) > BLOCK_PX:
            height, width = shapes[-1]
            shapes.append(((height + 1) // 2, (width + 1) // 2))
        return shapes

    def sampled_levels(self) -> int:
        """Return the number of levels whose pixels are no larger than a cell."""
        return min(len(self.level_shapes()), 1 + max(0, math.floor(math.log2(self.cell_lv0))))

    def coarse_levels(self, of_map: int) -> list[Float[np.ndarray, "Y X"]]:
        """Return the levels of a map after the sampled ones: together fewer pixels than half the lattice."""
        shapes, first = self.level_shapes(), self.sampled_levels()
        levels: list[np.ndarray] = []
        for height, width in shapes[first:]:
            if levels:
                levels.append(halved(levels[-1]))
                continue
            level = np.empty((height, width), np.float32)
            for top in range(0, height, _BAND_PX):
                below = self.sample(of_map, first - 1, 2 * top, 0, (2 * _BAND_PX, shapes[first - 1][1]))
                level[top : top + _BAND_PX] = halved(below)
            levels.append(level)
        return levels

    def sample(self, of_map: int, level: int, top: int, left: int, size: tuple[int, int]) -> Float[np.ndarray, "Y X"]:
        """Return a rectangle of a sampled level, clipped to the level.

        Args:
            of_map: index of the map.
            level: index of the level.
            top: first row.
            left: first column.
            size: rows and columns.
        """
        rows, columns = (
            self._tokens(level, first, count, axis)
            for axis, (first, count) in enumerate(zip((top, left), size, strict=True))
        )
        tokens = self.values_MRC[of_map, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if np.isnan(tokens).all():
            return np.full((len(rows), len(columns)), np.nan, np.float32)
        return np.asarray(tokens)[np.ix_(rows - rows[0], columns - columns[0])]

    def _tokens(self, level: int, first: int, count: int, axis: int) -> np.ndarray:
        """Return the cell at the centre of each pixel along an axis; centres beyond the edge are in the last cell."""
        pixels = np.arange(first, min(first + count, self.level_shapes()[level][axis]))
        tokens: np.ndarray = np.floor((pixels + 0.5) * 2.0**level / self.cell_lv0).astype(np.intp)
        return tokens.clip(0, self.values_MRC.shape[1 + axis] - 1)

    def blocks(self, of_map: int, level: int, coarse: list[np.ndarray]) -> Iterator[Float[np.ndarray, "Y X"]]:
        """Yield the blocks of a level row by row, padded with NaN at its edges.

        Args:
            of_map: index of the map.
            level: index of the level.
            coarse: the map's levels after the sampled ones, from :meth:`coarse_levels`.
        """
        height, width = self.level_shapes()[level]
        sampled = self.sampled_levels()
        for top in range(0, height, BLOCK_PX):
            for left in range(0, width, BLOCK_PX):
                if level < sampled:
                    inside = self.sample(of_map, level, top, left, (BLOCK_PX, BLOCK_PX))
                else:
                    inside = coarse[level - sampled][top : top + BLOCK_PX, left : left + BLOCK_PX]
                block = np.full((BLOCK_PX, BLOCK_PX), np.nan, np.float32)
                block[: inside.shape[0], : inside.shape[1]] = inside
                yield block


def _cell_lv0(grid: TokenGrid, coords_T2: Int[np.ndarray, "T 2"]) -> float:
    """Return the side of a cell in level-0 pixels."""
    steps = coords_T2 / grid.token_lv0
    if not len(steps) or np.abs(steps - np.rint(steps)).max() < 1e-6:
        return grid.token_lv0
    divisor = math.gcd(grid.tile_lv0, int(np.gcd.reduce(coords_T2.astype(np.int64), axis=None)))
    return float(max(divisor, grid.token_lv0 / _MOST_CELLS))
