"""Decoding processes: their number, their start and end, and a watchdog, so that a run never waits for them forever.

Workers that cannot start or transfer their tiles (``/dev/shm`` is full, no more processes or open files) are
dispensable: they raise :class:`WorkersUnavailable`, and the stream decodes the rest itself. If a worker ends or hangs,
the slide fails, because decoding its tiles in the run's own process could end or hang that too.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import cv2

from maskattn.errors import SlideError

if TYPE_CHECKING:  # decoding processes do not import torch
    from torch import nn

__all__ = ["Heartbeat", "WorkersUnavailable", "count_workers", "outlasts_decoding", "watched", "worker_settings"]

_PREFETCHED_BATCHES = 2
_TILES_WORTH_A_WORKER = 2000  # a worker takes seconds to start, about as long as decoding these
_MOST_WORKERS = 4
# Between the demonstration's encoder, which two cores run as fast as they decode, and ViT-Ti/16.
_WEIGHTS_A_PIXEL_OF_A_LONG_MODEL = 12_000
_LOOK_EVERY_S = 5.0
_STALLED_AFTER_S = 120.0

Batch = TypeVar("Batch")


class WorkersUnavailable(Exception):  # noqa: N818 -- not an error: the stream continues without them
    """Workers cannot start, or cannot transfer what they decode; the message is the system's reason."""


def outlasts_decoding(encoder: nn.Module, token_px: int) -> bool:
    """Return whether a CPU takes far longer to encode a tile than to decode it, judged by the weights for each pixel.

    Every weight of a transformer is multiplied once for each token, of ``token_px``² pixels.
    """
    weights = sum(weight.numel() for weight in encoder.parameters())
    return weights > _WEIGHTS_A_PIXEL_OF_A_LONG_MODEL * token_px**2


def count_workers(workers: int | None, tiles: int, batches: int, *, needs_the_cores: bool = False) -> int:
    """Return the number of decoding processes.

    Args:
        workers: the requested number; None chooses by the numbers of tiles and cores.
        tiles: the number of tiles to decode.
        batches: the number of batches that these are.
        needs_the_cores: whether a model that outlasts decoding computes on the same cores. A worker takes one from it,
            and decodes in a few milliseconds a tile that takes a vision transformer fifty on two cores.
    """
    if workers is None:
        most = _cores() // 4 if needs_the_cores else _cores() // 2
        workers = min(_MOST_WORKERS, most) if tiles >= _TILES_WORTH_A_WORKER else 0
    return min(workers, _cores(), batches)


class Heartbeat:
    """The time at which any worker last decoded a tile, shared with the workers through the dataset.

    Raises:
        WorkersUnavailable: the machine has no more semaphores, open files or shared memory.
    """

    def __init__(self) -> None:
        try:
            _context().Queue().close()  # tried first: a DataLoader that cannot create its queues fails uncleanly
            # The monotonic clock is the same in every process of a machine.
            self._at: Any = _context().RawValue("d", time.monotonic())
        except OSError as error:
            raise WorkersUnavailable(str(error)) from error

    def beat(self) -> None:
        """Record that a tile was decoded just now."""
        self._at.value = time.monotonic()

    def silent_s(self) -> float:
        """Return the seconds since the last tile."""
        return time.monotonic() - float(self._at.value)


def watched(batches: Iterator[Batch], heartbeat: Heartbeat, path: Path) -> Iterator[Batch]:
    """Yield the batches of a DataLoader made with :func:`worker_settings`, and watch that its workers decode.

    Args:
        batches: the loader's iterator.
        heartbeat: the heartbeat of its workers.
        path: the slide, for messages.

    Raises:
        SlideError: a worker ended, or none has decoded a tile for two minutes.
        WorkersUnavailable: a batch cannot be transferred to this process.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            text = " ".join(str(error).split())
            if "in DataLoader worker process" in text:  # raised by the dataset in the worker, not by the transfer
                raise
            if text.startswith("DataLoader timed out"):
                if heartbeat.silent_s() < _STALLED_AFTER_S:
                    continue
                raise SlideError(_stalled(path)) from error
            if "exited unexpectedly" in text or "killed by signal" in text:
                raise SlideError(_ended(path)) from error
            raise WorkersUnavailable(text) from error
        yield batch


def _stalled(path: Path) -> str:
    return (
        f"a tile must decode within {_STALLED_AFTER_S:g} s, got none in that time from '{path}': its drive does not "
        "respond, or the file makes a decoder run forever; check the drive, copy the file again, or convert it to a "
        "tiled pyramidal TIFF"
    )


def _ended(path: Path) -> str:
    return (
        f"a decoding worker must live as long as its slide, got one that ended on '{path}': it was killed, most often "
        "for lack of memory, or crashed on this file; give the run more memory, or run the slide again with "
        "`--workers 0` or a smaller `--batch-size`"
    )


def worker_settings() -> dict[str, Any]:
    """Return the arguments of a DataLoader with workers."""
    return {
        "multiprocessing_context": _context(),
        "prefetch_factor": _PREFETCHED_BATCHES,
        "worker_init_fn": _start_worker,
        "timeout": _LOOK_EVERY_S,
    }


def _context() -> Any:
    # A fork server that has loaded only the stream: a fork of this process would inherit its threads' locks and its
    # GPU, and each spawned worker would have to import torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskattn.slide.stream"])
    return context


def _cores() -> int:
    """Return the number of cores that this process may use; DataLoader warns of more workers than that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_worker: int) -> None:
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End the worker with a killed run: torch watches only the fork server, which the worker itself keeps alive."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
