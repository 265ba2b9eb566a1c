"""The stream of a slide's kept tiles: decoded by torch's DataLoader, in worker processes if asked, ahead of the model.

Tiles come in the grid's order. Batch size and number of workers change neither the tiles nor their order. Memory is
bounded by (prefetched batches per worker) · workers · (a batch's bytes).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskattn.errors import SlideError
from maskattn.shapes import Bool, Int, UInt8
from maskattn.slide.grid import TokenGrid
from maskattn.slide.reader import SlideReader

__all__ = ["TileBatch", "count_workers", "stream_tiles"]

_PREFETCHED_BATCHES = 2
_TILES_WORTH_A_WORKER = 2000  # a worker takes seconds to start, about as long as decoding these
_MOST_WORKERS = 4


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles on their way to the model.

    Attributes:
        tiles_BCHW: (B, 3, tile_px, tile_px) uint8 RGB; white where unreadable.
        rows_B: (B,) int64, the rows of the grid's kept tiles that these are.
        readable_B: (B,) bool, False where the tile could not be decoded.
    """

    tiles_BCHW: UInt8[Tensor, "B 3 tile_px tile_px"]
    rows_B: Int[Tensor, " B"]
    readable_B: Bool[Tensor, " B"]

    def pin_memory(self) -> TileBatch:
        """The same batch in page-locked memory, from which a GPU copies without waiting; DataLoader calls this."""
        return TileBatch(self.tiles_BCHW.pin_memory(), self.rows_B.pin_memory(), self.readable_B.pin_memory())


def stream_tiles(
    reader: SlideReader,
    grid: TokenGrid,
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
        workers: decoding processes; 0 decodes in this one, None starts some where there are tiles and cores enough
            for them to pay off. At most one per core is started.
        rows: which of the grid's kept tiles, by row, and in which order; by default all of them.
        pin_memory: whether to hand batches over in page-locked memory; without a GPU this is passed over.

    Raises:
        ValueError: ``batch_size``, ``workers`` or ``rows`` is out of range.
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
    loader: DataLoader[TileBatch] = DataLoader(
        _Tiles(reader, grid, order),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory and torch.cuda.is_available(),
        **(_worker_settings() if workers else {}),
    )
    return iter(loader)


def count_workers(workers: int | None, tiles: int, batch_size: int) -> int:
    """How many decoding processes :func:`stream_tiles` starts for so many tiles; None lets it choose."""
    if workers is None:
        workers = min(_MOST_WORKERS, _cores() // 2) if tiles >= _TILES_WORTH_A_WORKER else 0
    return min(workers, _cores(), -(-tiles // batch_size))


class _Tiles(Dataset[TileBatch]):
    """The kept tiles of a grid, fetched a batch at a time into one tensor."""

    def __init__(self, reader: SlideReader, grid: TokenGrid, rows: np.ndarray):
        self._reader = reader
        self._coords_lv0 = grid.coords_lv0[rows]
        self._rows = rows
        self._tile_lv0 = grid.tile_lv0
        self._tile_px = grid.tile_px

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, items: list[int]) -> TileBatch:
        side = self._tile_px
        tiles_BHWC = np.full((len(items), side, side, 3), 255, np.uint8)
        readable_B = torch.ones(len(items), dtype=torch.bool)
        for place, item in enumerate(items):
            x, y = self._coords_lv0[item].tolist()
            try:
                tiles_BHWC[place] = self._reader.read_region(x, y, (self._tile_lv0, self._tile_lv0), (side, side))
            except SlideError:
                readable_B[place] = False
        tiles_BCHW = torch.from_numpy(tiles_BHWC).permute(0, 3, 1, 2).contiguous()
        return TileBatch(tiles_BCHW, torch.from_numpy(self._rows[items]), readable_B)


def _as_is(batch: Any) -> Any:
    return batch


def _cores() -> int:
    """Cores that this process may use; DataLoader warns of more workers than that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_worker: int) -> None:
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed run must not wait forever: torch watches the fork server, which the worker keeps alive."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _worker_settings() -> dict[str, Any]:
    # A server that has loaded this module and nothing else: a fork of this process would inherit its threads' locks
    # and its GPU, and a spawned worker would load torch anew each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return {
        "multiprocessing_context": context,
        "prefetch_factor": _PREFETCHED_BATCHES,
        "worker_init_fn": _start_worker,
    }
