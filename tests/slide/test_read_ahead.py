"""One batch is made ahead of its reader, by another thread, and never more."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from maskattn.slide.read_ahead import one_ahead

WITHIN_S = 20.0


class Source:
    """Numbers from 0 on, which say when they are made; the one at ``fails_at`` is an error."""

    def __init__(self, numbers: int, fails_at: int | None = None) -> None:
        self.made = [threading.Event() for _ in range(numbers)]
        self.threads: set[str] = set()
        self.stops = 0
        self._fails_at = fails_at

    def stop(self) -> None:
        self.stops += 1

    def __iter__(self) -> Iterator[int]:
        for number, made in enumerate(self.made):
            self.threads.add(threading.current_thread().name)
            if number == self._fails_at:
                raise OSError("the drive is gone")
            made.set()
            yield number


def test_all_come_in_order_and_from_another_thread():
    source = Source(7)
    assert list(one_ahead(iter(source), source.stop)) == list(range(7))
    assert threading.current_thread().name not in source.threads
    assert list(one_ahead(iter(Source(0)), source.stop)) == []


def test_the_next_batch_is_made_while_its_reader_is_at_work_and_the_one_after_it_is_not():
    source = Source(5)
    batches = one_ahead(iter(source), source.stop)
    assert next(batches) == 0
    assert source.made[1].wait(WITHIN_S)
    assert not source.made[2].wait(0.2)
    assert next(batches) == 1
    assert source.made[2].wait(WITHIN_S)
    batches.close()


def test_a_reader_that_leaves_early_stops_the_thread():
    source = Source(5)
    batches = one_ahead(iter(source), source.stop)
    next(batches)
    batches.close()
    assert source.stops == 1
    assert not any(thread.name.startswith("read_ahead") for thread in threading.enumerate())


def test_an_error_reaches_the_reader_after_what_came_before_it():
    source = Source(5, fails_at=2)
    batches = one_ahead(iter(source), source.stop)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the drive is gone"):
        next(batches)
