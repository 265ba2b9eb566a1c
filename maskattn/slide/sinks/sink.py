"""The contract of a sink, which makes one kind of output from the tiles of an explained slide.

A sink is opened for a slide, takes its tiles batch by batch in the grid's order, and is closed after the last batch.
Nothing here imports torch, because code that runs no model asks for the names of the files.

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
        reader: the slide's reader, for its size and its thumbnail; None if only features are given.
        header: the metadata that all of its tiles share.
        grid: the slide's token grid; its kept tiles include those that could not be read.
        model: the metadata of the slide model.
        scores: the softmax score of each class.
        method: the title of the method of explanation.
        verdicts: the verdict of the map check of each class; empty if maps are not tested.
        coords_T2: (T, 2) level-0 x, y of each tile's top left corner.
        features_TC: (T, C) embeddings.
        relevance_KT: (K, T) signed score of each tile for each class.
        attention_T: (T,) attention of the slide's class token to each tile.
        with_tokens: whether the batches carry maps of tokens.
        token_mask: "tissue" where the model left background tokens out, "none" where every token of a tile took part.
        settings: the settings of the run.
        encoder: the name of the tile encoder; empty if it is not known.
        attention_of: a noun phrase for captions that says whose attention is mapped.
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
        tiles_B: (B,) indices into the slide's T tiles.
        keep_Bhw: (B, h, w) bool, the kept tokens, without those of a tile that could not be read a second time.
        relevance_KBhw: (K, B, h, w) signed score of each token, 0 at background; None without token maps.
        attention_Bhw: (B, h, w) attention of the tile's class token to each token; None without token maps.
    """

    tiles_B: Int[np.ndarray, " B"]
    keep_Bhw: Bool[np.ndarray, "B h w"]
    relevance_KBhw: Float[np.ndarray, "K B h w"] | None = None
    attention_Bhw: Float[np.ndarray, "B h w"] | None = None


Take = Callable[[ExplainedTiles], None]


class Sink(Protocol):
    """One kind of output; its attribute ``needs_no_slide`` is True if features without the slide suffice for it."""

    @property
    def files(self) -> tuple[str, ...]:
        """Shell patterns that match the names of all files that it may write."""

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Return whether a run with these settings makes this output."""

    def open(self, folder: Path, slide: ExplainedSlide) -> AbstractContextManager[Take]:
        """Write the output of a slide to its folder.

        The context yields the function that takes a batch. The files are complete when the context ends; if it ends
        with an error, no file is left.

        Args:
            folder: the slide's output folder.
            slide: the slide's results.

        Raises:
            OSError: a file cannot be written.
        """
