"""The two loops over a slide's tiles: the first encodes them, the second explains them and feeds the sinks.

Token maps are made in the second loop and passed to the sinks batch by batch: only their size grows with the number of
a slide's tokens, and they are never all in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.explain.hierarchical import RelevanceMap
from maskattn.explain.map_check import MapCheck
from maskattn.explain.methods import METHODS
from maskattn.explain.region_tokens import attention_ranks
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.nn.inference_linear import packed_weights
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.slide.device_copies import HostCopies, to_device
from maskattn.slide.grid import TokenGrid
from maskattn.slide.run_tiles import RunTiles
from maskattn.slide.sinks import SINKS, ExplainedSlide, ExplainedTiles
from maskattn.slide.slide_run import EncodedTiles, SlideRun
from maskattn.slide.stored_regions import StoredRegions

if TYPE_CHECKING:
    from maskattn.slide.tilings import TilingMeans

__all__ = ["encode_tiles", "explained_tokens", "feed_sinks"]

_REGIONS_AT_ONCE = 8


def encode_tiles(run: SlideRun, grid: TokenGrid) -> EncodedTiles:
    """Encode a slide's tiles in the grid's order; unreadable tiles are left out.

    Raises:
        SlideError: no tile can be read.
    """
    embeddings_TC: Tensor | None = None
    readable_T = np.zeros(grid.kept_tiles, dtype=bool)
    reason: str | None = None
    with packed_weights(run.model):
        for batch in run.read(grid):
            with run.stages("encode", runs_ahead=True):
                with torch.inference_mode():
                    keep_BHW = batch.keep_BHW if run.model.masks_tokens else None
                    encoded_BC = run.model.encode_tiles(batch.tiles_BCHW, keep_BHW).float()
                if embeddings_TC is None:
                    # Made outside inference mode: the relevance pass takes gradients with respect to it.
                    embeddings_TC = torch.zeros(grid.kept_tiles, encoded_BC.shape[1], device=run.device)
                embeddings_TC[to_device(batch.rows_B, run.device)] = encoded_BC
            readable_T[batch.rows_B] = batch.readable_B
            reason = reason or batch.reason
    rows_T = np.flatnonzero(readable_T)
    if embeddings_TC is None or not len(rows_T):
        raise SlideError(
            f"a slide must have tiles that can be read, got {grid.kept_tiles} of {grid.kept_tiles} unreadable in "
            f"{run.job.path}; the first because {reason}"
        )
    return EncodedTiles(embeddings_TC[torch.from_numpy(rows_T).to(run.device)], rows_T, reason)


def feed_sinks(
    folder: Path,
    run: SlideRun,
    tiles: RunTiles,
    encoded: EncodedTiles,
    relevance: RelevanceMap,
    scores: dict[str, float],
    checks: dict[str, MapCheck],
    means: TilingMeans | None = None,
) -> None:
    """Write all requested outputs to a slide's folder, in one loop over its tiles.

    Args:
        folder: the slide's folder.
        run: the slide's run; with ``settings.tokens`` its tiles are read a second time.
        tiles: the tiles of the slide.
        encoded: the tiles' embeddings.
        relevance: the relevance of the tiles, with its gradient if token maps are requested.
        scores: class → score.
        checks: class → the test of its map; empty if maps are not tested.
        means: the means over several tilings, from which ``relevance`` comes; None if tiles do not overlap.

    Raises:
        OSError: a file cannot be written.
    """
    grid = tiles.grid
    slide = ExplainedSlide(
        slide_id=run.job.slide_id,
        reader=None if run.alone else run.reader,
        header=tiles.header,
        grid=grid,
        model=run.model.config,
        scores=scores,
        method=METHODS[run.settings.method].title,
        verdicts={name: check.map_check for name, check in checks.items()},
        coords_T2=grid.coords_lv0[encoded.rows_T],
        features_TC=_numpy(encoded.embeddings_TC),
        relevance_KT=_numpy(relevance.relevance_KT),
        attention_T=_numpy(relevance.attention_T),
        with_tokens=run.with_tokens,
        token_mask="tissue" if run.settings.masked and run.model.card.token_mask == "tissue" else "none",
        settings=run.settings,
        encoder="" if run.model.card.encoder is None else run.model.card.encoder.name,
        attention_of=_attention_of(run),
    )
    if run.has_patches:
        assert tiles.stored is not None, "patches come from stored regions"
        batches = _with_patches(run, grid, tiles.stored, relevance)
    elif means is not None and means.first is not None:
        batches = means.batches(explained_tokens(run, grid, encoded, means.first))
    elif slide.with_tokens:
        batches = explained_tokens(run, grid, encoded, relevance)
    else:
        batches = _tiles_alone(run, grid, encoded)
    with ExitStack() as opened:
        with run.stages("write"):
            takes = [
                opened.enter_context(sink.open(folder, slide))
                for sink in SINKS
                if sink.is_asked_for(run.settings) and (not run.alone or getattr(sink, "needs_no_slide", False))
            ]
        for batch in batches:
            with run.stages("write", on_host=True):
                for take in takes:
                    take(batch)
        with run.stages("write"):
            opened.close()


def _attention_of(run: SlideRun) -> str:
    """Return a description of what the attention map shows."""
    if run.has_patches:
        return "region and slide level"
    if isinstance(run.model.encoder, RegionEncoder) and run.with_tokens:
        return "patch, region and slide level"
    if run.settings.attention == "rollout":
        return "all layers of the slide model (rollout)"
    return "the class token" if isinstance(run.model.head, ViTHead) else "the slide model"


def _tiles_alone(run: SlideRun, grid: TokenGrid, encoded: EncodedTiles) -> Iterator[ExplainedTiles]:
    """Yield batches of tiles without token maps, which need no pixels."""
    T, size = len(encoded.rows_T), run.settings.batch_size
    for first in range(0, T, size):
        tiles_B = np.arange(first, min(first + size, T))
        yield ExplainedTiles(tiles_B, grid.token_keep_THW[encoded.rows_T[tiles_B]])


def explained_tokens(
    run: SlideRun, grid: TokenGrid, encoded: EncodedTiles, relevance: RelevanceMap
) -> Iterator[ExplainedTiles]:
    """Read the tiles a second time, and yield batches of them with token maps.

    Args:
        run: the slide's run.
        grid: the grid of the tiles.
        encoded: the tiles' embeddings.
        relevance: the relevance of the tiles, with its gradient.
    """
    explain = SlideHeadCDAM(run.model.head, run.model.encoder, run.settings.method)
    assert relevance.gradient_KTC is not None, "the pipeline computes the gradient if token maps are requested"
    ranks_T = attention_ranks(relevance.attention_T)
    computed: Iterator[ExplainedTiles] = iter(())
    for batch in run.read(grid, encoded.rows_T):
        with run.stages("tokens", runs_ahead=True):
            tiles_B = np.searchsorted(encoded.rows_T, batch.rows_B)
            some = to_device(tiles_B, run.device)
            gradient_KBC = relevance.gradient_KTC[:, some]
            keep_BHW = batch.keep_BHW if run.model.masks_tokens else None
            maps = explain.tokens(batch.tiles_BCHW, keep_BHW, gradient_KBC, ranks_T[some])
            copies = HostCopies(maps.relevance_KBHW, maps.attention_BHW)
        yield from computed  # a GPU computes this batch while the sinks take the one before it
        # A tile that is unreadable the second time has no token map.
        keep_Bhw = grid.token_keep_THW[batch.rows_B] & batch.readable_B[:, None, None]
        computed = _on_host(run, tiles_B, keep_Bhw, copies)
    yield from computed


def _on_host(run: SlideRun, tiles_B: np.ndarray, keep_Bhw: np.ndarray, copies: HostCopies) -> Iterator[ExplainedTiles]:
    """Yield one batch, when a GPU has computed it."""
    with run.stages("tokens", on_host=True):
        relevance_KBhw, attention_Bhw = copies.arrays()
    yield ExplainedTiles(tiles_B, keep_Bhw, relevance_KBhw * keep_Bhw, attention_Bhw * keep_Bhw)


def _with_patches(
    run: SlideRun, grid: TokenGrid, stored: StoredRegions, relevance: RelevanceMap
) -> Iterator[ExplainedTiles]:
    """Yield batches of regions with maps of their patches, from stored features."""
    level = run.model.region_level
    assert level is not None, "a run on stored regions has a region level"
    explain = SlideHeadCDAM(run.model.head, None, run.settings.method, region_level=level)
    assert relevance.gradient_KTC is not None, "the pipeline computes the gradient if token maps are requested"
    for tiles_B, features_BNC, keep_BN in stored.batches(_REGIONS_AT_ONCE, run.device):
        with run.stages("tokens"):
            gradient_KBC = relevance.gradient_KTC[:, torch.from_numpy(tiles_B).to(run.device)]
            maps = explain.patches(features_BNC, keep_BN, gradient_KBC)
        yield ExplainedTiles(
            tiles_B, grid.token_keep_THW[tiles_B], _numpy(maps.relevance_KBHW), _numpy(maps.attention_BHW)
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
