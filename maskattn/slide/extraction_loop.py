"""The loop over a slide's tiles that encodes them, batch by batch, while the next batch is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from maskattn.errors import SlideError
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.inference_linear import packed_weights
from maskattn.slide.batch_sizes import sizes_of_batches
from maskattn.slide.device_copies import HostCopies, to_device
from maskattn.slide.each_slide import OnTiles
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.reader import SlideReader
from maskattn.slide.slide_run import Stages, cores_left_to
from maskattn.slide.stream import TileBatch, stream_tiles
from maskattn.slide.tile_places import TilePlaces
from maskattn.slide.workers import count_workers, outlasts_decoding

__all__ = ["ExtractionLoop", "computing_in"]

_EncodedBatch = tuple[HostCopies, np.ndarray]
"""Features of a batch's readable tiles, and the tiles' indices."""


class ExtractionLoop:
    """The encoding of a slide's tiles, with counts of what is done.

    Args:
        reader: the open slide.
        encoder: the encoder on the device to use.
        settings: the request.
        stages: the clock, which times the stages "read" and "encode".
        places: the tiles.
        on_tiles: called with (tiles done, tiles to do) after every batch.

    Attributes:
        tiles: the number of tiles encoded so far.
        kept_tokens: the number of their kept tokens.
        reason: why the first unreadable tile could not be read; None if all could.
        workers: the number of processes that decoded tiles; 0 = only this one.
    """

    def __init__(
        self,
        reader: SlideReader,
        encoder: TileEncoder,
        settings: ExtractSettings,
        stages: Stages,
        places: TilePlaces,
        on_tiles: OnTiles | None,
    ) -> None:
        self.tiles = 0
        self.kept_tokens = 0
        self.reason: str | None = None
        self.workers = 0
        self._reader, self._encoder, self._settings = reader, encoder, settings
        self._stages, self._places, self._on_tiles = stages, places, on_tiles

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield features (B, C) float32 of batches of readable tiles, and the tiles' indices (B,).

        Raises:
            SlideError: no tile can be read, or a feature is not finite.
        """
        settings, places, device = self._settings, self._places, self._encoder.device
        tokens_per_tile = (self._encoder.tile_px // self._encoder.token_px) ** 2
        sizes = sizes_of_batches(settings, places.kept_tiles, places.token_keep_THW, tokens_per_tile)
        long = device.type == "cpu" and outlasts_decoding(self._encoder, self._encoder.token_px)
        workers = count_workers(settings.workers, places.kept_tiles, len(sizes), needs_the_cores=long)
        batches = stream_tiles(
            self._reader,
            places,
            batch_size=sizes,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        done = 0
        encoded: _EncodedBatch | None = None
        with packed_weights(self._encoder), cores_left_to(workers, device):
            while True:
                with self._stages("read", on_host=True):
                    batch = next(batches, None)
                if batch is None:
                    break
                if batch.by_worker:
                    self.workers = workers
                if batch.damages is not None:
                    self._reader.damages.merge(batch.damages)
                self.reason = self.reason or batch.reason
                if bool(batch.readable_B.any()):
                    queued = self._encode(batch)
                    if encoded is not None:  # a GPU computes the next batch while this one is written
                        yield self._on_host(*encoded)
                    encoded = queued
                done += len(batch.rows_B)
                if self._on_tiles is not None:
                    self._on_tiles(done, places.kept_tiles)
            if encoded is not None:
                yield self._on_host(*encoded)
        if not self.tiles:
            raise SlideError(
                f"a slide must have tiles that can be read, got {places.kept_tiles} of {places.kept_tiles} unreadable "
                f"in {self._reader.path}; the first because {self.reason}"
            )

    def _encode(self, batch: TileBatch) -> _EncodedBatch:
        """Queue a batch's work on the device."""
        device, readable_B = self._encoder.device, batch.readable_B
        rows_B = batch.rows_B[readable_B].numpy()
        keep_BHW = None
        if self._places.token_keep_THW is not None:
            kept = np.ascontiguousarray(self._places.token_keep_THW[rows_B])
            self.kept_tokens += int(np.count_nonzero(kept))
            keep_BHW = to_device(kept, device)
        else:
            self.kept_tokens += len(rows_B) * (self._encoder.tile_px // self._encoder.token_px) ** 2
        tiles = batch.tiles_BCHW if bool(readable_B.all()) else batch.tiles_BCHW[readable_B]
        with (
            self._stages("encode", runs_ahead=True),
            torch.inference_mode(),
            computing_in(self._settings.dtype, device),
        ):
            features = self._encoder.encode_tiles(tiles.to(device, non_blocking=True), keep_BHW)
            return HostCopies(features), rows_B

    def _on_host(self, copies: HostCopies, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of a batch and its tiles' indices, when the device has computed them."""
        with self._stages("encode", on_host=True):
            (features,) = copies.arrays()
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            x, y = self._places.coords_lv0[rows_B[row]]
            raise SlideError(
                f"features must be finite, got {features[row][~np.isfinite(features[row])][0]} in the tile at x={x}, "
                f"y={y} of {self._reader.path} by {self._encoder.name} in {self._settings.dtype}; "
                + ("use --dtype bfloat16 or float32" if self._settings.dtype == "float16" else "check its weights")
            )
        self.tiles += len(rows_B)
        return features, rows_B


@contextlib.contextmanager
def computing_in(dtype: str, device: torch.device) -> Iterator[None]:
    """Compute in a dtype of :class:`ExtractSettings`; other dtypes than float32 use autocast."""
    if dtype == "float32":
        yield
        return
    with torch.autocast(device.type, dtype=getattr(torch, dtype)):
        yield
