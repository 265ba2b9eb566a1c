"""Memory that is not initialised is NaN, so that what a kernel forgets to write shows and no test passes by luck."""

from __future__ import annotations

import pytest
import torch

__all__ = ["poison_uninitialised_memory"]


def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``torch.empty`` and ``torch.empty_like`` return NaN."""

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
