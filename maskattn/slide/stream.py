"""The stream of a slide's kept tiles, which are decoded ahead of the model: by torch's DataLoader, in workers if asked.

Tiles come in the grid's order. Batch size and number of workers change neither the tiles nor their order. Memory is
bounded by (prefetched batches per worker) · workers · (a batch's bytes); without workers, one batch is decoded ahead by
a thread. If workers cannot be started, the stream goes on without them and says so.
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
from maskattn.slide.damage import DamageLog
from maskattn.slide.read_ahead import one_ahead
from maskattn.slide.reader import SlideReader
from maskattn.slide.workers import Heartbeat, WorkersUnavailable, count_workers, watched, worker_settings

__all__ = ["TileBatch", "Tiles", "stream_tiles"]

_logger = logging.getLogger(__name__)


class Tiles(Protocol):
    """The tiles of a slide: the kept ones of a :class:`~maskattn.slide.grid.TokenGrid`, or others' places."""

    @property
    def coords_lv0(self) -> Int[np.ndarray, "T 2"]:
        """(T, 2) x and y of the left upper corner of each."""

    @property
    def kept_tiles(self) -> int:
        """T."""

    @property
    def tile_lv0(self) -> int:
        """Side in level-0 pixels."""

    @property
    def tile_px(self) -> int:
        """Side of the image that a tile is read as."""


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles on their way to the model.

    Attributes:
        tiles_BCHW: (B, 3, tile_px, tile_px) uint8 RGB; white where unreadable.
        rows_B: (B,) int64, the tiles' indices among the grid's kept tiles.
        readable_B: (B,) bool, False where the tile could not be decoded.
        reason: why the first of those could not; None where all could.
        by_worker: a worker process decoded them.
        damages: what the worker's reader met on the way; None where it met nothing, or no worker read.
    """

    tiles_BCHW: UInt8[Tensor, "B 3 tile_px tile_px"]
    rows_B: Int[Tensor, " B"]
    readable_B: Bool[Tensor, " B"]
    reason: str | None = None
    by_worker: bool = False
    damages: DamageLog | None = None

    def pin_memory(self) -> TileBatch:
        """The same batch in page-locked memory, from which a GPU copies without waiting; DataLoader calls this."""
        return replace(
            self,
            tiles_BCHW=self.tiles_BCHW.pin_memory(),
            rows_B=self.rows_B.pin_memory(),
            readable_B=self.readable_B.pin_memory(),
        )

    def share_memory(self) -> None:
        """Put the tensors into shared memory, in place.

        Raises:
            RuntimeError, OSError: there is no room for them.
        """
        for tensor in (self.tiles_BCHW, self.rows_B, self.readable_B):
            tensor.share_memory_()


def stream_tiles(
    reader: SlideReader,
    grid: Tiles,
    *,
    batch_size: int,
    workers: int | None = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    pin_memory: bool = False,
) -> Iterator[TileBatch]:
    """Decode the kept tiles of a slide, batch by batch, in the grid's order.

    A tile that cannot be decoded comes white, with ``readable_B`` False, and the stream goes on. As with every use of
    Python's worker processes, a script that asks for them guards its entry with ``if __name__ == "__main__"``.

    Args:
        reader: the slide; its workers open it again for themselves.
        grid: which tiles.
        batch_size: tiles of a batch; the last may have fewer.
        workers: decoding processes; 0 decodes in a thread of this one, None starts some where there are tiles and
            cores enough for them to pay off. At most one per core is started.
        rows: which of the grid's kept tiles, by index, and in which order; by default all of them.
        pin_memory: whether to hand batches over in page-locked memory; without a GPU this is passed over.

    Raises:
        ValueError: ``batch_size``, ``workers`` or ``rows`` is out of range.
        SlideError: while the stream is read: a worker or the decoder ended or hangs.
    """
    if batch_size < 1 or (workers is not None and workers < 0):
        raise ValueError(
            f"stream_tiles needs batch_size >= 1 and workers >= 0, got batch_size={batch_size}, workers={workers}"
        )
    order = np.arange(grid.kept_tiles) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
    if order.size and (order.min() < 0 or order.max() >= grid.kept_tiles):
        raise ValueError(
            f"stream_tiles needs rows of the grid's {grid.kept_tiles} kept tiles, got {order.min()} to {order.max()}; "
            "count them as grid.coords_lv0 does"
        )
    workers = count_workers(workers, order.size, batch_size)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "collate_fn": _as_is,
        "pin_memory": pin_memory and torch.cuda.is_available(),
    }
    if workers:
        return _decoded_by_workers(reader, grid, order, workers, settings)
    return _decoded_here(_Tiles(reader, grid, order), settings)


def _decoded_here(tiles: _Tiles, settings: dict[str, Any]) -> Iterator[TileBatch]:
    """Batches from a thread of this process."""
    return one_ahead(iter(DataLoader(tiles, num_workers=0, **settings)), tiles.stop)


def _decoded_by_workers(
    reader: SlideReader, grid: Tiles, order: np.ndarray, workers: int, settings: dict[str, Any]
) -> Iterator[TileBatch]:
    """Batches from worker processes; from where these cannot be had on, from this process."""
    done = 0
    try:
        heartbeat = Heartbeat()
        for batch in watched(
            _started(_Tiles(reader, grid, order, heartbeat), workers, settings), heartbeat, reader.path
        ):
            if isinstance(batch, WorkersUnavailable):
                raise batch
            done += len(batch.rows_B)
            yield batch
        return
    except WorkersUnavailable as refusal:
        _logger.warning(
            "decoding of %s goes on without worker processes, which is slower: %s; a smaller --batch-size needs less "
            "shared memory, and in a container `--shm-size` gives more (--workers 0 asks for none)",
            reader.path,
            refusal,
        )
    yield from _decoded_here(_Tiles(reader, grid, order[done:]), settings)


def _started(tiles: _Tiles, workers: int, settings: dict[str, Any]) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(tiles, num_workers=workers, **settings, **worker_settings())
    try:
        return iter(loader)
    except (OSError, EOFError) as error:  # no more processes
        raise WorkersUnavailable(str(error)) from error


class _Tiles(Dataset[TileBatch]):
    """The kept tiles of a grid, fetched a batch at a time into one tensor; ``heartbeat`` is called for every tile."""

    def __init__(self, reader: SlideReader, grid: Tiles, rows: np.ndarray, heartbeat: Heartbeat | None = None):
        self._reader = reader
        self._coords_lv0 = grid.coords_lv0[rows]
        self._rows = rows
        self._tile_lv0 = grid.tile_lv0
        self._tile_px = grid.tile_px
        self._heartbeat = heartbeat
        self._stopped = False

    def stop(self) -> None:
        """Let a batch that is being decoded in a thread end at its next tile; nobody will take it."""
        self._stopped = True

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, items: list[int]) -> TileBatch | WorkersUnavailable:
        batch = self._decode(items)
        if get_worker_info() is not None:
            batch = replace(batch, damages=self._reader.damages.take())
            try:
                # Here and not on the way out, where a failure would reach nobody.
                batch.share_memory()
            except (RuntimeError, OSError) as error:
                return WorkersUnavailable(" ".join(str(error).split()))
        return batch

    def _decode(self, items: list[int]) -> TileBatch:
        side = self._tile_px
        tiles_BHWC = np.full((len(items), side, side, 3), 255, np.uint8)
        readable_B = torch.ones(len(items), dtype=torch.bool)
        reason = None
        for index, item in enumerate(items):
            if self._stopped:
                break
            x, y = self._coords_lv0[item].tolist()
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
        # By NumPy, as torch would start threads for it beside those of the model.
        tiles_BCHW = torch.from_numpy(np.ascontiguousarray(tiles_BHWC.transpose(0, 3, 1, 2)))
        return TileBatch(tiles_BCHW, torch.from_numpy(self._rows[items]), readable_B, reason, by_worker)


def _as_is(batch: Any) -> Any:
    return batch
