"""Bags: the tiles of a case as the input of a slide model, read from disk on demand.

Dimension key: T tiles, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskattn.nn.random_masks import drop_random_tokens
from maskattn.nn.slide_models.head import TileGrid
from maskattn.shapes import Float
from maskattn.slide.layouts import in_reading_order, read_features
from maskattn.training.cohort import Case

__all__ = ["Bag", "CaseBags", "CaseDataset", "Draw", "Sampling", "joined_bags"]


@dataclass(frozen=True, eq=False)
class Bag:
    """Tiles that a slide model reads together.

    Attributes:
        embeddings_TC: (T, C) float32.
        coords_um_T2: (T, 2), x and y of each tile in µm; None if unknown.
        grid: the tiles' cells; None if they lie on no lattice.
    """

    embeddings_TC: Float[Tensor, "T C"]
    coords_um_T2: Float[Tensor, "T 2"] | None
    grid: TileGrid | None

    def to(self, device: torch.device) -> Bag:
        """Return the bag on a device; coordinates and cells stay on the host, where heads read them."""
        return Bag(self.embeddings_TC.to(device, non_blocking=True), self.coords_um_T2, self.grid)


@dataclass(frozen=True, eq=False)
class CaseBags:
    """A case as the input of a model: one bag, or one for each slide.

    Attributes:
        index: the case's index in its dataset.
        bags: the case's tiles.
        truth: see :class:`maskattn.training.cohort.Case`.
    """

    index: int
    bags: tuple[Bag, ...]
    truth: tuple[float, ...]

    @property
    def tiles(self) -> int:
        """The number of tiles in all bags."""
        return sum(len(bag.embeddings_TC) for bag in self.bags)

    def to(self, device: torch.device) -> CaseBags:
        """Return the case on a device."""
        return CaseBags(self.index, tuple(bag.to(device) for bag in self.bags), self.truth)


@dataclass(frozen=True)
class Draw:
    """A request for a case in an epoch, on which random numbers depend."""

    index: int
    epoch: int


@dataclass(frozen=True)
class Sampling:
    """The random choice of a slide's tiles for training.

    Attributes:
        seed: the choice depends on it, the epoch and the slide's id, and not on the order of reading or on workers.
        tiles_per_slide: the largest number of tiles; None takes all.
        drop: share of these tiles that is dropped.
    """

    seed: int = 0
    tiles_per_slide: int | None = None
    drop: float = 0.0

    def chosen(self, slide_id: str, epoch: int, tiles: int) -> np.ndarray | None:
        """Return the indices of the tiles in ascending order; None if all are taken."""
        if not self.drop and (self.tiles_per_slide is None or tiles <= self.tiles_per_slide):
            return None
        words = [self.seed, epoch, zlib.crc32(slide_id.encode())]
        rng = np.random.default_rng(words)
        rows = np.arange(tiles)
        if self.tiles_per_slide is not None and tiles > self.tiles_per_slide:
            rows = np.sort(rng.choice(tiles, self.tiles_per_slide, replace=False))
        if self.drop:
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            keep_1T = drop_random_tokens(torch.ones(1, len(rows), dtype=torch.bool), self.drop, generator)
            rows = rows[keep_1T[0].numpy()]
        return rows


class CaseDataset(Dataset[CaseBags]):
    """Cases, read one at a time.

    Args:
        cases: the cases.
        fusion: "early" joins the tiles of a case's slides; otherwise each slide is a bag.
        reads_grid: whether the model needs tiles on a lattice.
        encoder: the encoder whose features are read if a file has those of several.
        sampling: the choice of tiles for training; None takes all.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        fusion: Literal["early", "late", "none"] = "early",
        reads_grid: bool = False,
        encoder: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.cases = list(cases)
        self._fusion, self._reads_grid, self._encoder, self._sampling = fusion, reads_grid, encoder, sampling

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, draw: Draw) -> CaseBags:
        """Read the bags of a case.

        Raises:
            SlideError: a file of features can no longer be used.
        """
        case = self.cases[draw.index]
        bags = tuple(self._bag(slide_id, path, draw.epoch) for slide_id, path in case.slides.items())
        if self._fusion == "early" and len(bags) > 1:
            bags = (joined_bags(bags),)
        return CaseBags(draw.index, bags, case.truth)

    def _bag(self, slide_id: str, path: Path, epoch: int) -> Bag:
        tiles, keep_HW = in_reading_order(
            read_features(path, encoder=self._encoder, named=(slide_id, path.stem)), self._reads_grid
        )
        um = tiles.spacing_lv0_um if tiles.on_level0 else tiles.spacing_um
        chosen = None if self._sampling is None else self._sampling.chosen(slide_id, epoch, len(tiles.features_TC))
        rows = slice(None) if chosen is None else chosen
        grid = None
        if keep_HW is not None:
            cells_T2 = torch.from_numpy(np.argwhere(keep_HW)[rows])
            grid = TileGrid(cells_T2[:, 0], cells_T2[:, 1], (keep_HW.shape[0], keep_HW.shape[1]))
        coords_um = None if um is None else torch.from_numpy(tiles.coords_T2[rows] * um).float()
        return Bag(torch.from_numpy(tiles.features_TC[rows].astype(np.float32)), coords_um, grid)


def joined_bags(bags: Sequence[Bag]) -> Bag:
    """Join the tiles of several slides into one bag, in which the slides lie below one another."""
    embeddings_TC = torch.cat([bag.embeddings_TC for bag in bags])
    grids = [bag.grid for bag in bags]
    coords = [bag.coords_um_T2 for bag in bags]
    grid = _stacked([one for one in grids if one is not None]) if all(one is not None for one in grids) else None
    coords_um_T2: Tensor | None = None
    if all(one is not None for one in coords):
        below, shifted = 0.0, []
        for one in coords:
            assert one is not None, "all bags have coordinates"
            shifted.append(one + torch.tensor([0.0, below]))
            below = float(shifted[-1][:, 1].max()) + 1e4  # farther than attention reaches within a slide
        coords_um_T2 = torch.cat(shifted)
    return Bag(embeddings_TC, coords_um_T2, grid)


def _stacked(grids: Sequence[TileGrid]) -> TileGrid:
    above, rows = 0, []
    for one in grids:
        rows.append(one.rows_T + above)
        above += one.shape_HW[0]
    columns_T = torch.cat([one.columns_T for one in grids])
    return TileGrid(torch.cat(rows), columns_T, (above, max(one.shape_HW[1] for one in grids)))
