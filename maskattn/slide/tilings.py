"""Maps averaged over the tilings of a slide with overlapping tiles (``overlap.py``).

The relevance and the attention of a token are the mean of its values in all n² tilings, with equal weights. Its value
is 0 in a tiling in which it does not take part, because its tile there has too little tissue or cannot be read. For the
maps of tiles, a tile's relevance and attention are spread evenly over its kept tokens; those of the first tiling's
tiles, which are output, are the sum of the means of their tokens. The mean relevance on tokens of no such tile is
reported as ``on_no_tile``.

The map of a class, together with the relevance on class tokens and on no tile and with the gaps, therefore sums to the
mean over the tilings of the class's score minus that of the baseline.

The sums of tokens are in an unnamed temporary file, so that memory does not grow with the slide's tokens.

Dimension key: T readable tiles of the first tiling, N tokens of these tiles, B tiles of a batch, (h, w) tokens of a
tile, K classes, M = K + 1 maps, S tilings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.explain.hierarchical import RelevanceMap, SumOfMap
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.shapes import Float, Int
from maskattn.slide.grid import TokenGrid
from maskattn.slide.overlap import tilings_of
from maskattn.slide.run_tiles import RunTiles, shifted_tiles
from maskattn.slide.sinks import ExplainedTiles
from maskattn.slide.slide_run import EncodedTiles, SlideRun
from maskattn.slide.tile_loop import encode_tiles, explained_tokens

__all__ = ["TilingMeans", "averaged_tilings"]

_TILES_AT_A_TIME = 1024


@dataclass(frozen=True, eq=False)
class _Tiling:
    """The positions of a tiling's tiles among the tokens of the slide.

    Attributes:
        grid: the grid of its tiles.
        cells_T2: (T, 2) row and column of each of its kept tiles.
        before: (x, y), the number of tokens by which it starts before the slide's corner.
    """

    grid: TokenGrid
    cells_T2: Int[np.ndarray, "T 2"]
    before: tuple[int, int]

    @classmethod
    def of(cls, grid: TokenGrid, before: tuple[int, int] = (0, 0)) -> _Tiling:
        return cls(grid, np.argwhere(grid.keep_HW), before)


class TilingMeans:
    """The sums of the maps of several tilings, and their means on the tiles of the first.

    Args:
        grid: the grid of the first tiling.
        rows_T: (T,) the indices of its readable tiles among its kept tiles.
        classes: K, the number of classes.
        tilings: the number of tilings.
        folder: the folder of the temporary file.
    """

    def __init__(
        self, grid: TokenGrid, rows_T: Int[np.ndarray, " T"], classes: int, tilings: int, folder: Path
    ) -> None:
        self.tilings = tilings
        self.logits_SK: list[Tensor] = []
        """The logits (K,) of each tiling that has tiles."""
        self.outside_K = np.zeros(classes)
        """(K,) the mean relevance on tokens that belong to none of the first tiling's tiles."""
        self._first = _Tiling.of(grid)
        self._rows_T = rows_T
        self._side = grid.token_keep_THW.shape[1]
        self._tile_of_cell = np.full(grid.keep_HW.shape, -1, np.int64)
        self._tile_of_cell[tuple(self._first.cells_T2[rows_T].T)] = np.arange(len(rows_T))
        self._tiles_MT = np.zeros((classes + 1, len(rows_T)))
        self._sums: list[SumOfMap] = []
        self.first: RelevanceMap | None = None
        """The relevance of the first tiling alone; None until it is added."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- lives as long as the sums
        shape = classes + 1, len(rows_T) * self._side**2
        # The file is sparse: pages without a sum take no space. The system caches as many pages as memory allows.
        self._tokens_MN: Float[np.ndarray, "M N"] = np.memmap(self._file, np.float32, "w+", shape=shape)

    def close(self) -> None:
        """Delete the temporary file."""
        del self._tokens_MN
        self._file.close()

    def add_tiles(self, tiling: _Tiling, rows: Int[np.ndarray, " B"], relevance: RelevanceMap) -> None:
        """Add the relevance and attention of a tiling's readable tiles, by their indices among its kept tiles."""
        self.logits_SK.append(relevance.logits_K.float().cpu())
        if relevance.sums is not None:
            self._sums.append(relevance.sums)
        values_MT = torch.cat([relevance.relevance_KT, relevance.attention_T[None]]).double().cpu().numpy()
        T = self._tiles_MT.shape[1]
        for first in range(0, len(rows), _TILES_AT_A_TIME):
            batch = slice(first, first + _TILES_AT_A_TIME)
            tokens_Bhw = self._tokens_of(tiling, rows[batch])
            known = tokens_Bhw >= 0
            tile, under = np.nonzero(known)[0], tokens_Bhw[known] // self._side**2
            pairs, counts = np.unique(tile * T + under, return_counts=True)
            of_tile, of_first = np.divmod(pairs, max(T, 1))
            shares = counts / np.bincount(tile, minlength=len(tokens_Bhw))[of_tile]
            values_MB = values_MT[:, batch]
            for target, source in zip(self._tiles_MT, values_MB, strict=True):
                np.add.at(target, of_first, source[of_tile] * shares)
            outside_B = ~known.any(axis=(1, 2))
            self.outside_K += values_MB[:-1, outside_B].sum(axis=1) / self.tilings

    def add_tokens(
        self, tiling: _Tiling, rows: Int[np.ndarray, " T"], attention_T: np.ndarray, tiles: ExplainedTiles
    ) -> None:
        """Add the token maps of a batch of tiles.

        Args:
            tiling: the tiling of the tiles.
            rows: (T,) the indices of its readable tiles among its kept tiles.
            attention_T: (T,) the attention of its readable tiles.
            tiles: a batch of its readable tiles, with token maps.
        """
        assert tiles.relevance_KBhw is not None, "batches have token maps"
        assert tiles.attention_Bhw is not None, "relevance and attention come together"
        tokens_Bhw = self._tokens_of(tiling, rows[tiles.tiles_B])
        known = (tokens_Bhw >= 0) & tiles.keep_Bhw
        at = tokens_Bhw[known]
        for target, values_Bhw in zip(self._tokens_MN[:-1], tiles.relevance_KBhw, strict=True):
            target[at] += values_Bhw[known]
        self._tokens_MN[-1][at] += (tiles.attention_Bhw * attention_T[tiles.tiles_B, None, None])[known]

    def add_first(self, relevance: RelevanceMap) -> RelevanceMap:
        """Add the tiles of the first tiling, after those of all others.

        Returns:
            Its logits and gradient, with the means over all tilings instead of its own relevance, attention and sums.
        """
        self.add_tiles(self._first, self._rows_T, relevance)
        self.first = relevance
        means_MT = torch.from_numpy(self._tiles_MT / self.tilings).to(relevance.relevance_KT)
        sums = None if relevance.sums is None else _mean_of(self._sums, self.tilings)
        return replace(relevance, relevance_KT=means_MT[:-1], attention_T=means_MT[-1], sums=sums)

    def batches(self, own: Iterable[ExplainedTiles]) -> Iterator[ExplainedTiles]:
        """Yield the batches of the first tiling with the means over all tilings instead of its own token maps."""
        side = self._side
        assert self.first is not None, "the first tiling must be added before"
        own_T = self.first.attention_T.float().cpu().numpy()
        attention_T = (self._tiles_MT[-1] / self.tilings).astype(np.float32)
        for tiles in own:
            assert tiles.relevance_KBhw is not None, "batches have token maps"
            assert tiles.attention_Bhw is not None, "relevance and attention come together"
            index_Bn = tiles.tiles_B[:, None] * side**2 + np.arange(side**2)
            sums_MBhw = self._tokens_MN[:, index_Bn].reshape(-1, len(tiles.tiles_B), side, side)
            own_Bhw = tiles.attention_Bhw * own_T[tiles.tiles_B, None, None]
            means_MBhw = (np.concatenate([tiles.relevance_KBhw, own_Bhw[None]]) + sums_MBhw) / self.tilings
            means_MBhw *= tiles.keep_Bhw
            # Outputs multiply a token's attention by its tile's.
            of_tile_B = attention_T[tiles.tiles_B, None, None]
            within_Bhw = np.divide(means_MBhw[-1], of_tile_B, out=np.zeros_like(means_MBhw[-1]), where=of_tile_B > 0)
            yield ExplainedTiles(tiles.tiles_B, tiles.keep_Bhw, means_MBhw[:-1], within_Bhw)

    def _tokens_of(self, tiling: _Tiling, rows_B: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B h w"]:
        """Return the indices of some tiles' tokens among the first tiling's; −1 for tokens not kept in either."""
        side, (rows, columns) = self._side, self._first.grid.keep_HW.shape[:2]
        rows_Bh, columns_Bw = (
            tiling.cells_T2[rows_B, axis, None] * side + np.arange(side) - tiling.before[1 - axis] for axis in (0, 1)
        )
        inside = ((rows_Bh >= 0) & (rows_Bh < rows * side))[:, :, None]
        inside = inside & ((columns_Bw >= 0) & (columns_Bw < columns * side))[:, None, :]
        rows_Bh, columns_Bw = rows_Bh.clip(0, rows * side - 1), columns_Bw.clip(0, columns * side - 1)
        tile_Bhw = self._tile_of_cell[rows_Bh[:, :, None] // side, columns_Bw[:, None, :] // side]
        down, right = (rows_Bh % side)[:, :, None], (columns_Bw % side)[:, None, :]
        kept = self._first.grid.token_keep_THW[self._rows_T[tile_Bhw.clip(0)], down, right]
        known = inside & (tile_Bhw >= 0) & kept & tiling.grid.token_keep_THW[rows_B]
        return np.where(known, (tile_Bhw * side + down) * side + right, -1)


@contextmanager
def averaged_tilings(
    run: SlideRun, tiles: RunTiles, encoded: EncodedTiles, explain: SlideHeadCDAM, folder: Path
) -> Iterator[TilingMeans | None]:
    """Run all tilings but the first, one after another, and yield their sums; None if tiles do not overlap.

    Args:
        run: the slide's run.
        tiles: the tiles of the first tiling.
        encoded: their embeddings.
        explain: the explanation of the model.
        folder: the folder of a temporary file.

    Raises:
        ManifestError: the requested overlap does not shift tiles by whole tokens.
    """
    if not (run.settings.overlap and run.with_tokens):
        yield None
        return
    others = tilings_of(run.settings.overlap, tiles.grid.token_keep_THW.shape[1])[1:]
    classes = len(run.model.config.classes)
    run.tilings = 1 + len(others)
    means = TilingMeans(tiles.grid, encoded.rows_T, classes, 1 + len(others), folder)
    try:
        for before in others:
            _add_tiling(run, means, shifted_tiles(run, tiles, before), before, explain)
        yield means
    finally:
        means.close()


def _add_tiling(
    run: SlideRun, means: TilingMeans, tiles: RunTiles | None, before: tuple[int, int], explain: SlideHeadCDAM
) -> None:
    if tiles is None:
        return
    try:
        encoded = encode_tiles(run, tiles.grid)
    except SlideError:  # none of its tiles can be read, though others can
        return
    tiling = _Tiling.of(tiles.grid, before)
    with run.stages("slide"):
        rollout = run.settings.attention == "rollout"
        relevance = explain.tiles(encoded.embeddings_TC, *tiles.places(encoded.rows_T), gradient=True, rollout=rollout)
        means.add_tiles(tiling, encoded.rows_T, relevance)
    attention_T = relevance.attention_T.float().cpu().numpy()
    for batch in explained_tokens(run, tiles.grid, encoded, relevance):
        with run.stages("tokens"):
            means.add_tokens(tiling, encoded.rows_T, attention_T, batch)


def _mean_of(sums: list[SumOfMap], tilings: int) -> SumOfMap:
    total = [sum(getattr(one, name) for one in sums) / tilings for name in ("difference_K", "prefix_K", "gap_K")]
    return SumOfMap(*total)
