"""The run of one slide: the state and the clock that its stages share, and its batches of tiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskattn.nn.slide_models.two_stage import TwoStageModel
from maskattn.shapes import Bool, Float, Int, UInt8
from maskattn.slide.batch_sizes import equal_batches, sizes_of_batches
from maskattn.slide.device_copies import to_device
from maskattn.slide.grid import TokenGrid
from maskattn.slide.manifest import SlideJob
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.request import RunSettings
from maskattn.slide.stream import TileBatch, stream_tiles
from maskattn.slide.workers import count_workers, outlasts_decoding

__all__ = ["EncodedTiles", "ReadTiles", "SlideRun", "Stages", "cores_left_to"]


@dataclass(frozen=True, eq=False)
class EncodedTiles:
    """Embeddings of the tiles that could be read.

    Attributes:
        embeddings_TC: (T, C), in the grid's order.
        rows_T: (T,) their indices among the grid's kept tiles.
        reason: why the first unreadable tile could not be read; None if all could.
    """

    embeddings_TC: Float[Tensor, "T C"]
    rows_T: Int[np.ndarray, " T"]
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class ReadTiles:
    """A batch of tiles and their masks on the model's device.

    Attributes:
        tiles_BCHW: (B, 3, Y, X) uint8 RGB, on the device.
        keep_BHW: (B, h, w) bool, True for kept tokens, on the device.
        rows_B: (B,) the tiles' indices among the grid's kept tiles, on the host.
        readable_B: (B,) bool, False for tiles that cannot be read, on the host.
        reason: why the first unreadable tile cannot be read; None if all can.
    """

    tiles_BCHW: UInt8[Tensor, "B 3 Y X"]
    keep_BHW: Bool[Tensor, "B h w"]
    rows_B: Int[np.ndarray, " B"]
    readable_B: Bool[np.ndarray, " B"]
    reason: str | None


class Stages:
    """A clock of seconds per stage; a nested stage stops the clock of the outer one.

    On a GPU each stage waits for its own work to end. A stage with ``runs_ahead``, in a loop over batches, waits only
    for its previous batch, so that the GPU has work while the next batch is read; the remaining time of the last batch
    counts towards the stage that waits for it.

    Args:
        device: the model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._running: list[str] = []
        self._since = 0.0
        self._previous: dict[str, torch.cuda.Event] = {}

    @contextmanager
    def __call__(self, name: str, *, runs_ahead: bool = False, on_host: bool = False) -> Iterator[None]:
        """Time the context, and add it to the stage's seconds.

        Args:
            name: the name of the stage.
            runs_ahead: do not wait for the GPU's work on this batch, only for that on the previous batch.
            on_host: do not wait for a GPU at all, which has no work of this stage.
        """
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            if self._device.type == "cuda" and not on_host and runs_ahead:
                self._wait_for_previous(name)
            elif self._device.type == "cuda" and not on_host:
                torch.cuda.synchronize(self._device)
            self._charge()
            self._running.pop()

    def _wait_for_previous(self, name: str) -> None:
        """Wait for the GPU work queued when this stage last ended, so that at most two batches are in memory."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        if name in self._previous:
            self._previous[name].synchronize()
        self._previous[name] = event

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class SlideRun:
    """The state that the stages of one slide's run share.

    Args:
        job: the slide.
        model: the tile encoder and the slide head, on their device.
        settings: how to run the slide.
        reader: the open slide; None if only its features are given.
        stages: the clock.
        on_tiles: called with (tiles done, tiles to do) after every batch.

    Raises:
        SlideError: the slide has no plausible spacing.
    """

    def __init__(
        self,
        job: SlideJob,
        model: TwoStageModel,
        settings: RunSettings,
        reader: SlideReader | None,
        stages: Stages,
        on_tiles: Callable[[int, int], None] | None = None,
    ) -> None:
        self.job, self.model, self.settings, self.stages = job, model, settings, stages
        self._reader = reader
        self._on_tiles = on_tiles
        self._tiles_done = 0
        self.tilings = 1
        """The number of tilings of the slide, for the progress report."""
        self.workers = 0
        """The number of processes that have decoded tiles so far; 0 = only this one."""
        self.has_patches = False
        """Whether maps show regions' patches, from stored features."""

    @property
    def alone(self) -> bool:
        """Whether only the slide's features are given, and not the slide."""
        return self._reader is None

    @property
    def with_tokens(self) -> bool:
        """Whether token maps are requested and can be made; the tokens of stored regions are their patches."""
        if self.has_patches:
            return True
        return self.settings.tokens and not self.alone and not self.model.why_no_tokens

    @property
    def reader(self) -> SlideReader:
        """The reader of the slide, which must be given."""
        assert self._reader is not None, "a run on features alone reads no slide"
        return self._reader

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self.reader.info

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def read(self, grid: TokenGrid, rows_T: Int[np.ndarray, " T"] | None = None) -> Iterator[ReadTiles]:
        """Yield the grid's kept tiles, or those with the given indices, in batches; waiting counts as "read"."""
        settings, encoder = self.settings, self.model.encoder
        keep_THW = grid.token_keep_THW if rows_T is None else grid.token_keep_THW[rows_T]
        tiles, at_once = len(keep_THW), None if encoder is None else encoder.tiles_at_once
        if at_once is not None:
            sizes = equal_batches(tiles, at_once)
        else:
            masks = keep_THW if self.model.masks_tokens else None
            sizes = sizes_of_batches(settings, tiles, masks, math.prod(keep_THW.shape[1:]))
        long = encoder is not None and self.device.type == "cpu" and outlasts_decoding(encoder, self.model.token_px)
        workers = count_workers(settings.workers, tiles, len(sizes), needs_the_cores=long)
        batches = stream_tiles(
            self.reader,
            grid,
            batch_size=sizes,
            workers=workers,
            rows=rows_T,
            pin_memory=self.device.type == "cuda",
        )
        with cores_left_to(workers, self.device):
            yield from self._move(batches, grid, workers)

    def _move(self, batches: Iterator[TileBatch], grid: TokenGrid, workers: int) -> Iterator[ReadTiles]:
        passes = self.tilings * 2 if self.with_tokens and self.settings.features_dir is None else 1
        while True:
            with self.stages("read", runs_ahead=True):
                batch = next(batches, None)
            if batch is None:
                return
            if batch.by_worker:
                self.workers = max(self.workers, workers)
            if batch.damages is not None:
                self.reader.damages.merge(batch.damages)
            rows_B = batch.rows_B.numpy()
            keep_BHW = to_device(grid.token_keep_THW[rows_B], self.device)
            tiles_BCHW = batch.tiles_BCHW.to(self.device, non_blocking=True)
            yield ReadTiles(tiles_BCHW, keep_BHW, rows_B, batch.readable_B.numpy(), batch.reason)
            self._tiles_done += len(rows_B)
            if self._on_tiles is not None:
                self._on_tiles(self._tiles_done, max(self._tiles_done, passes * grid.kept_tiles))


@contextmanager
def cores_left_to(workers: int, device: torch.device) -> Iterator[None]:
    """Reduce torch's threads by one per decoding worker while a model runs on the CPU, as waiting threads spin."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and workers:
        torch.set_num_threads(max(1, threads - workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
