"""Large results reuse the process's memory while a model runs, and it goes back to the system afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
LARGE = 40 << 20


@pytest.fixture
def usual() -> Iterator[None]:
    """glibc's thresholds as they are after a run, whatever other tests have allocated."""
    with keeping_memory():
        pass
    yield
    assert kept_memory._entered == 0


def in_heap(x: Tensor) -> bool:
    """Return whether a tensor's memory is part of the heap, which is kept, and not a mapping of its own."""
    heaps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    bounds = [[int(end, 16) for end in heap.split("-")] for heap in heaps]
    return any(first <= x.data_ptr() < last for first, last in bounds)


@needs_glibc
def test_large_results_come_from_the_heap_within_the_context_alone(usual: None) -> None:
    assert not in_heap(torch.empty(LARGE, dtype=torch.uint8))
    with keeping_memory():
        first = torch.ones(LARGE, dtype=torch.uint8)
        assert in_heap(first)
        position = first.data_ptr()
        del first
        assert torch.empty(LARGE, dtype=torch.uint8).data_ptr() == position
    assert not in_heap(torch.empty(LARGE, dtype=torch.uint8))


@needs_glibc
def test_contexts_may_overlap_and_end_with_an_error(usual: None) -> None:
    outer = keeping_memory()
    outer.__enter__()
    with pytest.raises(RuntimeError, match="failed"), keeping_memory():
        raise RuntimeError("failed")
    assert in_heap(torch.empty(LARGE, dtype=torch.uint8))
    outer.__exit__(None, None, None)
    assert not in_heap(torch.empty(LARGE, dtype=torch.uint8))


@needs_glibc
def test_a_run_over_batches_keeps_memory_where_its_model_is_on_a_cpu(usual: None) -> None:
    with packed_weights(nn.Linear(4, 4)):
        assert in_heap(torch.empty(LARGE, dtype=torch.uint8))
    with packed_weights(nn.Linear(4, 4, device="meta")):
        assert not in_heap(torch.empty(LARGE, dtype=torch.uint8))


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "_glibc", lambda: None)
    with keeping_memory():
        assert kept_memory._entered == 0
