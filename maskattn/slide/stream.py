"""The stream of a slide's kept tiles, decoded ahead of the model by torch's DataLoader, on request in worker processes.

Tiles come in the grid's order; batch size and number of workers affect neither the tiles nor their order. Memory is
bounded by (prefetched batches per worker) · workers · (bytes of a batch); without workers, a thread decodes one batch
ahead. If workers cannot be started, the stream continues without them and logs a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from maskattn.errors import ReadingStopped, SlideError
from maskattn.shapes import Bool, Int, UInt8
from maskattn.slide.batch_sizes import equal_batches
from maskattn.slide.damage import DamageLog
from maskattn.slide.read_ahead import one_ahead
from maskattn.slide.reader import SlideReader
from maskattn.slide.workers import Heartbeat, WorkersUnavailable, count_workers, watched, worker_settings

__all__ = ["TileBatch", "Tiles", "stream_tiles"]

_logger = logging.getLogger(__name__)


class Tiles(Protocol):
    """The tiles of a slide, for example those of a :class:`~maskattn.slide.grid.TokenGrid` or ``TilePlaces``."""

    @property
    def coords_lv0(self) -> Int[np.ndarray, "T 2"]:
        """(T, 2) x and y of each tile's top left corner."""

    @property
    def kept_tiles(self) -> int:
        """T, the number of tiles."""

    @property
    def tile_lv0(self) -> int:
        """Side of a tile in level-0 pixels."""

    @property
    def tile_px(self) -> int:
        """Side of the image that a tile is read as."""


@dataclass(frozen=True, eq=False)
class TileBatch:
    """A batch of decoded tiles.

    Attributes:
        tiles_BCHW: (B, 3, tile_px, tile_px) uint8 RGB; unreadable tiles are white.
        rows_B: (B,) int64, the tiles' indices among the grid's kept tiles.
        readable_B: (B,) bool, False for tiles that could not be decoded.
        reason: why the first unreadable tile could not be decoded; None if all could.
        by_worker: whether a worker process decoded them.
        damages: the damage that the worker's reader recorded; None if there was none, or no worker decoded them.
    """

    tiles_BCHW: UInt8[Tensor, "B 3 tile_px tile_px"]
    rows_B: Int[Tensor, " B"]
    readable_B: Bool[Tensor, " B"]
    reason: str | None = None
    by_worker: bool = False
    damages: DamageLog | None = None

    def pin_memory(self) -> TileBatch:
        """Return the batch in page-locked memory, from which a GPU copies asynchronously; DataLoader calls this."""
        return replace(
            self,
            tiles_BCHW=self.tiles_BCHW.pin_memory(),
            rows_B=self.rows_B.pin_memory(),
            readable_B=self.readable_B.pin_memory(),
        )

    def share_memory(self) -> None:
        """Move the tensors to shared memory, in place.

        Raises:
            RuntimeError, OSError: shared memory is full.
        """
        for tensor in (self.tiles_BCHW, self.rows_B, self.readable_B):
            tensor.share_memory_()


def stream_tiles(
    reader: SlideReader,
    grid: Tiles,
    *,
    batch_size: int | Sequence[int],
    workers: int | None = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    pin_memory: bool = False,
) -> Iterator[TileBatch]:
    """Yield the kept tiles of a slide in batches, in the grid's order.

    A tile that cannot be decoded is white, with ``readable_B`` False, and the stream continues. As always with Python's
    worker processes, a script that requests them must guard its entry point with ``if __name__ == "__main__"``.

    Args:
        reader: the open slide; workers open it again.
        grid: the tiles.
        batch_size: the number of tiles in a batch; the last may have fewer. Or the number in each batch, in order.
        workers: the number of decoding processes, at most one per core; 0 decodes in a thread of this process, None
            starts some if there are enough tiles and cores for them to pay off.
        rows: the indices of the kept tiles to decode, in order; None = all.
        pin_memory: whether batches are in page-locked memory; ignored without a GPU.

    Raises:
        ValueError: ``batch_size``, ``workers`` or ``rows`` is out of range.
        SlideError: while iterating, a worker or the decoder ended or hangs.
    """
    least = batch_size if isinstance(batch_size, int) else min(batch_size, default=1)
    if least < 1 or (workers is not None and workers < 0):
        raise ValueError(
            f"stream_tiles needs batch_size >= 1 and workers >= 0, got batch_size={least}, workers={workers}"
        )
    order = np.arange(grid.kept_tiles) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
    if order.size and (order.min() < 0 or order.max() >= grid.kept_tiles):
        raise ValueError(
            f"stream_tiles needs rows of the grid's {grid.kept_tiles} kept tiles, got {order.min()} to {order.max()}; "
            "pass indices into grid.coords_lv0"
        )
    sizes = equal_batches(order.size, batch_size) if isinstance(batch_size, int) else batch_size
    if sum(sizes) != order.size:
        raise ValueError(
            f"stream_tiles needs as many tiles in batches as there are, got batches of {sum(sizes)} together and "
            f"{order.size} tiles; pass the number of tiles in each batch"
        )
    batches = [order[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    workers = count_workers(workers, order.size, len(batches))
    pin_memory = pin_memory and torch.cuda.is_available()
    if workers:
        return _decoded_by_workers(reader, grid, batches, workers, pin_memory)
    return _decoded_here(_Tiles(reader, grid), batches, pin_memory)


def _decoded_here(tiles: _Tiles, batches: list[np.ndarray], pin_memory: bool) -> Iterator[TileBatch]:
    """Yield batches that a thread of this process decodes."""
    return one_ahead(iter(_loader(tiles, batches, pin_memory)), tiles.stop)


def _decoded_by_workers(
    reader: SlideReader, grid: Tiles, batches: list[np.ndarray], workers: int, pin_memory: bool
) -> Iterator[TileBatch]:
    """Yield batches that worker processes decode; if these become unavailable, this process decodes the rest."""
    done = 0
    try:
        heartbeat = Heartbeat()
        tiles = _Tiles(reader, grid, heartbeat)
        for batch in watched(_started(tiles, batches, workers, pin_memory), heartbeat, reader.path):
            if isinstance(batch, WorkersUnavailable):
                raise batch
            done += 1
            yield batch
        return
    except WorkersUnavailable as refusal:
        _logger.warning(
            "decoding of %s continues without worker processes, which is slower: %s; a smaller --batch-size needs less "
            "shared memory, and in a container `--shm-size` provides more (--workers 0 needs none)",
            reader.path,
            refusal,
        )
    yield from _decoded_here(_Tiles(reader, grid), batches[done:], pin_memory)


def _loader(tiles: _Tiles, batches: list[np.ndarray], pin_memory: bool, **of_workers: Any) -> DataLoader[Any]:
    """Return a loader of the batches, each given by the tiles' indices among the grid's kept tiles."""
    # The annotation asks for lists; the loader passes on whatever indices the sampler yields.
    sampler: Any = batches
    return DataLoader(tiles, batch_sampler=sampler, collate_fn=_as_is, pin_memory=pin_memory, **of_workers)


def _started(tiles: _Tiles, batches: list[np.ndarray], workers: int, pin_memory: bool) -> Iterator[Any]:
    loader = _loader(tiles, batches, pin_memory, num_workers=workers, **worker_settings())
    try:
        return iter(loader)
    except (OSError, EOFError) as error:  # no more processes
        raise WorkersUnavailable(str(error)) from error


class _Tiles(Dataset[TileBatch]):
    """The kept tiles of a grid as a dataset that decodes a batch into one tensor, with a heartbeat for every tile."""

    def __init__(self, reader: SlideReader, grid: Tiles, heartbeat: Heartbeat | None = None):
        self._reader = reader
        self._coords_lv0 = grid.coords_lv0
        self._tile_lv0 = grid.tile_lv0
        self._tile_px = grid.tile_px
        self._heartbeat = heartbeat
        self._stopped = False

    def stop(self) -> None:
        """Abandon the batch that a thread is decoding at its next tile; no one will use it."""
        self._stopped = True

    def __len__(self) -> int:
        return len(self._coords_lv0)

    def __getitems__(self, rows_B: np.ndarray) -> TileBatch | WorkersUnavailable:
        batch = self._decode(rows_B)
        if get_worker_info() is not None:
            batch = replace(batch, damages=self._reader.damages.take())
            try:
                # Shared here, because a failure in the DataLoader's own transfer would not be reported.
                batch.share_memory()
            except (RuntimeError, OSError) as error:
                return WorkersUnavailable(" ".join(str(error).split()))
        return batch

    def _decode(self, rows_B: np.ndarray) -> TileBatch:
        side = self._tile_px
        tiles_BHWC = np.full((len(rows_B), side, side, 3), 255, np.uint8)
        readable_B = torch.ones(len(rows_B), dtype=torch.bool)
        reason = None
        for index, row in enumerate(rows_B):
            if self._stopped:
                break
            x, y = self._coords_lv0[row].tolist()
            try:
                tiles_BHWC[index] = self._reader.read_region(x, y, (self._tile_lv0, self._tile_lv0), (side, side))
            except ReadingStopped:
                raise
            except SlideError as error:
                readable_B[index] = False
                reason = reason or str(error)
            if self._heartbeat is not None:
                self._heartbeat.beat()
        by_worker = get_worker_info() is not None
        # NumPy, because torch would start threads for this that compete with the model's.
        tiles_BCHW = torch.from_numpy(np.ascontiguousarray(tiles_BHWC.transpose(0, 3, 1, 2)))
        return TileBatch(tiles_BCHW, torch.from_numpy(rows_B.copy()), readable_B, reason, by_worker)


def _as_is(batch: Any) -> Any:
    return batch
