"""``features.h5``: the embeddings of tiles, in TRIDENT's layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Take
from maskattn.slide.tables import TileGeometry, write_features

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["Features"]


class Features:
    """The slide model's embedding of every tile, for other tools and for training slide encoders."""

    files = ("features.h5",)

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Always."""
        return True

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Write the table; the batches add nothing to it."""
        geometry = TileGeometry.of(slide.reader.info, slide.grid)
        write_features(folder / "features.h5", slide.features_TC, slide.coords_T2, geometry, slide.slide_id)
        yield _nothing_more


def _nothing_more(tiles: ExplainedTiles) -> None:
    """The embeddings of a slide are held together: its slide encoder has read them all."""
