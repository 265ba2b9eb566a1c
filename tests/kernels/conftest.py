"""The kernels run on a GPU, or in Triton's interpreter in a process of its own:

TRITON_INTERPRET=1 pytest tests/kernels
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETING = bool(triton.knobs.runtime.interpret)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if not torch.cuda.is_available() and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 set before pytest starts"))
        elif item.get_closest_marker("gpu") and (INTERPRETING or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, too slow in Triton's interpreter"))


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, so that no test passes by luck."""

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
