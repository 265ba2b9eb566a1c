"""The kernels run on a GPU, or in Triton's interpreter in a process of its own:

TRITON_INTERPRET=1 pytest tests/kernels
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from poisoned_memory import poison_uninitialised_memory

triton = pytest.importorskip("triton")

INTERPRETING = bool(triton.knobs.runtime.interpret)
if INTERPRETING:
    from interpreted_products import sum_in_float64

    from bench.aot.quick_interpreter import replace_once

    replace_once()
    sum_in_float64()


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
    poison_uninitialised_memory(monkeypatch)
