"""The contract of a sink: what makes one kind of output from the tiles of an explained slide.

A sink is opened for a slide, takes its tiles batch by batch in the grid's order, and is closed when all have come.
Nothing here imports torch: the names of the files are asked for where no model runs.

Dimension key: T tiles that could be read, B tiles of a batch, (h, w) tokens of a tile, K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from maskattn.shapes import Bool, Float, Int

if TYPE_CHECKING:
    from maskattn.nn.slide_model import SlideModelConfig
    from maskattn.nn.slide_models.card import ModelCard
    from maskattn.slide.grid import TokenGrid
    from maskattn.slide.layouts.tile_features import TileHeader, TokenMask
    from maskattn.slide.reader import SlideReader
    from maskattn.slide.request import RunSettings

__all__ = ["ExplainedSlide", "ExplainedTiles", "Sink", "Take"]


@dataclass(frozen=True, eq=False)
class ExplainedSlide:
    """A slide's results once the model has seen all of its tiles.

    Attributes:
        slide_id: the slide's id.
        reader: of the slide, for its size and its thumbnail; None where its features are all there is.
        header: what holds for all of its tiles.
        grid: of the slide; its kept tiles include those that could not be read.
        model: what the slide model says of itself.
        scores: class → softmax score.
        method: the title of the method of explanation.
        verdicts: class → verdict of the test of its map; empty where maps are not tested.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        features_TC: (T, C) embeddings.
        relevance_KT: (K, T) signed score of each tile for each class.
        attention_T: (T,) attention of the slide's class token to each tile.
        with_tokens: whether the batches carry maps of tokens.
        token_mask: "tissue" where the model left background tokens out, "none" where every token of a tile took part.
        settings: what the run was asked for.
        encoder: the name of the encoder of tiles; empty where it is not known.
        attention_of: what the attention is of, in words.
    """

    slide_id: str
    reader: SlideReader | None
    header: TileHeader
    grid: TokenGrid
    model: SlideModelConfig | ModelCard
    scores: Mapping[str, float]
    method: str
    verdicts: Mapping[str, str]
    coords_T2: Int[np.ndarray, "T 2"]
    features_TC: Float[np.ndarray, "T C"]
    relevance_KT: Float[np.ndarray, "K T"]
    attention_T: Float[np.ndarray, " T"]
    with_tokens: bool
    token_mask: TokenMask
    settings: RunSettings
    encoder: str = ""
    attention_of: str = "the class token"

    @property
    def slide_reader(self) -> SlideReader:
        """The slide's reader, for sinks that need it."""
        assert self.reader is not None, "a sink that needs the slide is not opened without it"
        return self.reader


@dataclass(frozen=True, eq=False)
class ExplainedTiles:
    """A batch of an explained slide's tiles.

    Attributes:
        tiles_B: (B,) which of the slide's T tiles they are.
        keep_Bhw: (B, h, w) bool, the tokens that are kept, less those of a tile that could not be read again.
        relevance_KBhw: (K, B, h, w) signed score of each token, 0 at background; None where tokens were not asked for.
        attention_Bhw: (B, h, w) attention of the tile's class token to each token; None as above.
    """

    tiles_B: Int[np.ndarray, " B"]
    keep_Bhw: Bool[np.ndarray, "B h w"]
    relevance_KBhw: Float[np.ndarray, "K B h w"] | None = None
    attention_Bhw: Float[np.ndarray, "B h w"] | None = None


Take = Callable[[ExplainedTiles], None]


class Sink(Protocol):
    """One kind of output; ``needs_no_slide`` = True where it is made from a slide's features alone too."""

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns, as a shell's, of the names of all the files that it writes."""

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Whether a run makes this output."""

    def open(self, folder: Path, slide: ExplainedSlide) -> AbstractContextManager[Take]:
        """Write the output of a slide to its folder.

        The context gives the function that takes a batch. When it ends the files are whole; when it ends by an error
        they are not there.

        Args:
            folder: where to.
            slide: the slide.

        Raises:
            OSError: a file cannot be written.
        """
