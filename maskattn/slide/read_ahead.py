"""Reading one batch ahead: the next batch is decoded while the model is at work on the present one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["one_ahead"]

Batch = TypeVar("Batch")


def one_ahead(batches: Iterator[Batch], stop: Callable[[], None]) -> Iterator[Batch]:
    """Yield the same batches, each made by a thread while the caller works on the one before it.

    Decoders release Python's global lock, so a single thread is enough to keep a core busy with decoding.

    Args:
        batches: the iterator to run ahead of; only that thread advances it.
        stop: called when the caller stops early; it makes a batch that is still being decoded end soon.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as thread:
        try:
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch
        finally:
            stop()
