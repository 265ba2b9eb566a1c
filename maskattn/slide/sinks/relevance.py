"""``relevance.h5``: raw signed relevance of tiles and, if requested, of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Take
from maskattn.slide.tables import relevance_table

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["Relevance"]


class Relevance:
    """The relevance of every tile for every class; that of tokens is written batch by batch."""

    files = ("relevance.h5",)
    needs_no_slide = True

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Return True: every run writes the table."""
        return True

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Write the tiles' relevance at once, and that of their tokens with each batch."""
        tokens_hw = slide.grid.token_keep_THW.shape[1:] if slide.with_tokens else None
        with relevance_table(
            folder / "relevance.h5",
            slide.model.classes,
            slide.relevance_KT,
            slide.attention_T,
            slide.coords_T2,
            slide.header,
            slide.method,
            tokens_hw,
        ) as write_tokens:

            def take(tiles: ExplainedTiles) -> None:
                if tiles.relevance_KBhw is not None and tiles.attention_Bhw is not None:
                    write_tokens(tiles.tiles_B, tiles.relevance_KBhw, tiles.attention_Bhw, tiles.keep_Bhw)

            yield take
