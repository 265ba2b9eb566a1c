"""Maps averaged over the tilings of a slide whose tiles overlap (``overlap.py``).

The relevance and the attention of a token are the mean over all tilings of what each tiling gives it, with one weight,
1 in n²: a tiling in which it takes no part, because its tile there holds too little tissue or cannot be read, gives 0.
A tile's relevance and attention are spread evenly over those of its tokens that take part; those of a tile of the first
tiling, which the outputs have, are the sum over its tokens of the mean. What falls on tokens of no such tile is told.

So what the map of a class sums to, with what is on class tokens and on no tile and with the gaps, is the mean over the
tilings of the class's score less that of the baseline.

The sums of tokens lie in a file without a name: memory does not grow with the slide's tokens.

Dimension key: T readable tiles of the first tiling, B tiles of a batch, (h, w) tokens of a tile, K classes, M = K + 1.
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
    """Where the tiles of a tiling lie among the tokens of the slide.

    Attributes:
        grid: of its tiles.
        cells_T2: (T, 2) row and column of each of its kept tiles.
        before: (x, y), how many tokens it begins before the slide's corner.
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
        grid: of the first tiling.
        rows_T: which of its kept tiles can be read.
        classes: K.
        tilings: how many there are.
        folder: where the file without a name may lie.
    """

    def __init__(
        self, grid: TokenGrid, rows_T: Int[np.ndarray, " T"], classes: int, tilings: int, folder: Path
    ) -> None:
        self.tilings = tilings
        self.logits_SK: list[Tensor] = []
        """The logits of each tiling that has tiles."""
        self.outside_K = np.zeros(classes)
        """The mean of what falls on tokens of none of the first tiling's tiles."""
        self._first = _Tiling.of(grid)
        self._rows_T = rows_T
        self._side = grid.token_keep_THW.shape[1]
        self._tile_of_cell = np.full(grid.keep_HW.shape, -1, np.int64)
        self._tile_of_cell[tuple(self._first.cells_T2[rows_T].T)] = np.arange(len(rows_T))
        self._tiles_MT = np.zeros((classes + 1, len(rows_T)))
        self._sums: list[SumOfMap] = []
        self.first: RelevanceMap | None = None
        """The map of the first tiling by itself."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- lives as long as the sums
        shape = classes + 1, len(rows_T) * self._side**2
        # Not written, hence no room taken, where nothing is added. The system keeps in memory what there is room for.
        self._tokens_MN: Float[np.ndarray, "M N"] = np.memmap(self._file, np.float32, "w+", shape=shape)

    def close(self) -> None:
        """Give the file back."""
        del self._tokens_MN
        self._file.close()

    def add_tiles(self, tiling: _Tiling, rows: Int[np.ndarray, " B"], relevance: RelevanceMap) -> None:
        """Take in the relevance and attention of a tiling's tiles, those of its kept tiles that can be read."""
        self.logits_SK.append(relevance.logits_K.float().cpu())
        if relevance.sums is not None:
            self._sums.append(relevance.sums)
        values_MT = torch.cat([relevance.relevance_KT, relevance.attention_T[None]]).double().cpu().numpy()
        T = self._tiles_MT.shape[1]
        for first in range(0, len(rows), _TILES_AT_A_TIME):
            some = slice(first, first + _TILES_AT_A_TIME)
            tokens_Bhw = self._tokens_of(tiling, rows[some])
            known = tokens_Bhw >= 0
            tile, under = np.nonzero(known)[0], tokens_Bhw[known] // self._side**2
            pairs, counts = np.unique(tile * T + under, return_counts=True)
            of_tile, of_first = np.divmod(pairs, max(T, 1))
            shares = counts / np.bincount(tile, minlength=len(tokens_Bhw))[of_tile]
            values_MB = values_MT[:, some]
            for target, source in zip(self._tiles_MT, values_MB, strict=True):
                np.add.at(target, of_first, source[of_tile] * shares)
            nowhere_B = ~known.any(axis=(1, 2))
            self.outside_K += values_MB[:-1, nowhere_B].sum(axis=1) / self.tilings

    def add_tokens(
        self, tiling: _Tiling, rows: Int[np.ndarray, " T"], attention_T: np.ndarray, tiles: ExplainedTiles
    ) -> None:
        """Take in the maps of the tokens of some tiles.

        Args:
            tiling: which.
            rows: those of its kept tiles that can be read.
            attention_T: (T,) their attention.
            tiles: some of these, with maps of tokens.
        """
        assert tiles.relevance_KBhw is not None, "batches carry maps of tokens"
        assert tiles.attention_Bhw is not None, "maps of tokens come together"
        tokens_Bhw = self._tokens_of(tiling, rows[tiles.tiles_B])
        known = (tokens_Bhw >= 0) & tiles.keep_Bhw
        at = tokens_Bhw[known]
        for target, values_Bhw in zip(self._tokens_MN[:-1], tiles.relevance_KBhw, strict=True):
            target[at] += values_Bhw[known]
        self._tokens_MN[-1][at] += (tiles.attention_Bhw * attention_T[tiles.tiles_B, None, None])[known]

    def add_first(self, relevance: RelevanceMap) -> RelevanceMap:
        """Take in the tiles of the first tiling, the last to come.

        Returns:
            Its logits and gradient, with the means of all tilings in place of its own relevance, attention and sums.
        """
        self.add_tiles(self._first, self._rows_T, relevance)
        self.first = relevance
        means_MT = torch.from_numpy(self._tiles_MT / self.tilings).to(relevance.relevance_KT)
        sums = None if relevance.sums is None else _mean_of(self._sums, self.tilings)
        return replace(relevance, relevance_KT=means_MT[:-1], attention_T=means_MT[-1], sums=sums)

    def batches(self, own: Iterable[ExplainedTiles]) -> Iterator[ExplainedTiles]:
        """The batches of the first tiling, with the means of all tilings in place of its own maps of tokens."""
        side = self._side
        assert self.first is not None, "the first tiling is the last to come"
        own_T = self.first.attention_T.float().cpu().numpy()
        attention_T = (self._tiles_MT[-1] / self.tilings).astype(np.float32)
        for tiles in own:
            assert tiles.relevance_KBhw is not None, "batches carry maps of tokens"
            assert tiles.attention_Bhw is not None, "maps of tokens come together"
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
        """Which tokens of the first tiling those of some tiles are; −1 where that is none, or takes no part."""
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
    """Run all tilings but the first, one after another; None where the run asks for no overlap.

    Args:
        run: the slide's run.
        tiles: of the first tiling.
        encoded: their embeddings.
        explain: of the model.
        folder: where a file without a name may lie.

    Raises:
        ManifestError: tiles cannot overlap by what was asked for.
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
    except SlideError:  # none of its tiles can be read, as others can
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
