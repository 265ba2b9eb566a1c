"""Large results reuse the process's memory while a model runs, and it goes back to the system afterwards."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from maskattn.nn import kept_memory
from maskattn.nn.inference_linear import packed_weights
from maskattn.nn.kept_memory import keeping_memory

needs_glibc = pytest.mark.skipif(
    kept_memory._glibc() is None or threading.current_thread() is not threading.main_thread(),
    reason="only glibc keeps memory, and in the heap only that of the main thread",
)
KEPT_BYTES = 40 << 20
# More than any free piece of the heap, which would be used whatever the thresholds are.
NOT_FREE_BYTES = 400 << 20


class RecordedLibrary:
    """A C library that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value >> 20))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.calls.append((pad,))
        return 1


def in_heap(size: int) -> bool:
    """Return whether a tensor of so many bytes is part of the heap, which is kept, and not a mapping of its own."""
    x: Tensor = torch.empty(size, dtype=torch.uint8)
    heaps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    bounds = [[int(end, 16) for end in heap.split("-")] for heap in heaps]
    return any(first <= x.data_ptr() < last for first, last in bounds)


@needs_glibc
def test_large_results_come_from_the_heap_within_the_context_alone() -> None:
    with keeping_memory():
        assert in_heap(KEPT_BYTES)
        assert not in_heap(NOT_FREE_BYTES)
    assert not in_heap(NOT_FREE_BYTES)


def test_thresholds_are_set_once_and_reset_after_the_last_of_contexts_that_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = RecordedLibrary()
    monkeypatch.setattr(kept_memory, "_glibc", lambda: library)
    entered = [(-3, 128), (-1, 256)]
    outer = keeping_memory()
    outer.__enter__()
    with pytest.raises(RuntimeError, match="failed"), keeping_memory():
        raise RuntimeError("failed")
    assert library.calls == entered
    outer.__exit__(None, None, None)
    assert library.calls == [*entered, (-3, 32), (-1, 64), (0,)]


def test_a_run_over_batches_keeps_memory_where_its_model_is_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedLibrary()
    monkeypatch.setattr(kept_memory, "_glibc", lambda: library)
    with packed_weights(nn.Linear(4, 4, device="meta")):
        assert not library.calls
    with packed_weights(nn.Linear(4, 4)):
        assert library.calls == [(-3, 128), (-1, 256)]


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "_glibc", lambda: None)
    with keeping_memory():
        assert kept_memory._entered == 0
