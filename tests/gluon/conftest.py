"""The Gluon kernel runs in a simulator of its own, which takes the kernels as they are and not as interpreted ones."""

from __future__ import annotations

import pytest
from poisoned_memory import poison_uninitialised_memory

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_uninitialised_memory(monkeypatch)
