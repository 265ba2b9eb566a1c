"""``features.h5``: the embeddings of tiles, in TRIDENT's layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from maskattn.slide.layouts.trident import feature_file
from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Take

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["Features"]


class Features:
    """The slide model's embedding of every tile, for other tools and for training slide encoders."""

    files = ("features.h5",)

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Return whether features are written: they are unless the run was given features."""
        return settings.features_dir is None

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Write the table at once; the batches add nothing to it."""
        header = replace(slide.header, encoder=slide.encoder or slide.model.name, token_mask=slide.token_mask)
        with feature_file(folder / "features.h5", header, slide.features_TC.shape[1]) as take:
            take(slide.features_TC, slide.coords_T2, None)
        yield _nothing_more


def _nothing_more(tiles: ExplainedTiles) -> None:
    """Ignore the batch: the embeddings of all tiles have been written already."""
