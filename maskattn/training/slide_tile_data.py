"""The dataset of labelled slides' tiles: a sample of each slide in each epoch, or all of them in order.

The sample of a slide and the augmentation of its tiles depend only on the seed, the epoch and the slide.
"""

from __future__ import annotations

import logging
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from maskattn.errors import SlideError
from maskattn.slide.names import as_text
from maskattn.slide.reader import SlideReader
from maskattn.training.augmentation import varied
from maskattn.training.bags import Draw, Sampling
from maskattn.training.cohort import Case
from maskattn.training.patches import PatchItem
from maskattn.training.slide_tiles import SlideTiles

__all__ = ["SlideTileDataset", "bags_of"]

_logger = logging.getLogger(__name__)

_MOST_OPEN = 16
_MOST_TRIED = 8


def bags_of(cases: Sequence[Case], fusion: Literal["early", "late", "none"]) -> list[tuple[int, tuple[str, ...]]]:
    """Return the bags of tiles that are averaged, as (index of the case, slides); one per slide with late fusion."""
    if fusion == "late":
        return [(index, (slide,)) for index, case in enumerate(cases) for slide in case.slides]
    return [(index, tuple(case.slides)) for index, case in enumerate(cases)]


class SlideTileDataset(Dataset[PatchItem]):
    """Tiles of slides, read one at a time; in training they are sampled and augmented.

    Args:
        cases: the cases that have the slides.
        tiles: slide → its tiles.
        fusion: how the slides of a case are joined, which determines the index of a tile's bag.
        most: number of tiles per slide, sampled in training and otherwise evenly spaced; None takes all.
        seed: seed of the sampling and the augmentation; None: neither.
        drop: share of the kept tokens that is dropped.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        tiles: Mapping[str, SlideTiles],
        fusion: Literal["early", "late", "none"],
        most: int | None,
        seed: int | None = None,
        drop: float = 0.0,
    ) -> None:
        bags = bags_of(cases, fusion)
        self._slides = [(bag, cases[case].truth, slide) for bag, (case, slides) in enumerate(bags) for slide in slides]
        self._tiles = {slide: tiles[slide] for _, _, slide in self._slides}
        self._most, self._seed, self._drop = most, seed, drop
        counts = [self._count(slide) for _, _, slide in self._slides]
        self._ends = np.cumsum(counts)
        self._readers = _OpenSlides()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, draw: Draw) -> PatchItem:
        """Read a tile.

        Raises:
            SlideError: neither the tile nor the slide's next ones can be decoded.
        """
        position = int(np.searchsorted(self._ends, draw.index, side="right"))
        bag, truth, slide = self._slides[position]
        number = draw.index - int(self._ends[position]) + self._count(slide)
        row = int(self.rows(slide, draw.epoch)[number])
        tiles = self._tiles[slide]
        row, pixels = self._decoded(slide, row)
        keep = tiles.keep(row)
        if self._seed is None:
            return PatchItem(bag, pixels.contiguous(), keep, truth)
        rng = np.random.default_rng([self._seed, draw.epoch, zlib.crc32(slide.encode()), row])
        return PatchItem(bag, *varied(pixels, keep, tiles.side, self._drop, rng), truth)

    def rows(self, slide: str, epoch: int) -> np.ndarray:
        """Return the indices of a slide's tiles that are read in an epoch, in ascending order."""
        total, count = len(self._tiles[slide]), self._count(slide)
        if self._seed is None:
            return np.linspace(0, total - 1, count).astype(np.int64)
        chosen = Sampling(self._seed, count).chosen(slide, epoch, total)
        return np.arange(total) if chosen is None else chosen

    def _count(self, slide: str) -> int:
        total = len(self._tiles[slide])
        return total if self._most is None else min(self._most, total)

    def _decoded(self, slide: str, row: int) -> tuple[int, Tensor]:
        """Return the row and the pixels of a tile, or of the slide's next one that can be decoded."""
        tiles, reason = self._tiles[slide], ""
        for step in range(min(_MOST_TRIED, len(tiles))):
            at = (row + step) % len(tiles)
            try:
                pixels = tiles.read(self._readers[tiles.path], at)
            except SlideError as error:
                reason = reason or str(error)
                continue
            if step:
                _logger.warning("a tile of %s cannot be decoded, and the next one replaces it: %s", slide, reason)
            return at, pixels
        raise SlideError(f"tiles of a slide must be readable, got {as_text(tiles.path)}: {reason}; leave the slide out")


class _OpenSlides:
    """A cache of open readers: those of the slides that were read last; the others are closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, SlideReader] = OrderedDict()

    def __getitem__(self, path: Path) -> SlideReader:
        if path not in self._open:
            self._open[path] = SlideReader(path)
        self._open.move_to_end(path)
        while len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)[1].close()
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}  # a worker process opens its own readers
