"""Buffers between red zones: a write outside them is found, and a read outside them is NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["RedZones"]

# Elements before and after a buffer; no tile in the interpreter's configurations is larger.
WIDTH = 1 << 14


class RedZones:
    """Puts every buffer that is allocated while it watches between two red zones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._zones: list[tuple[Tensor, Tensor]] = []
        for name in ("empty", "zeros", "full", "empty_like", "zeros_like"):
            monkeypatch.setattr(torch, name, self._guarded(getattr(torch, name)))

    def around(self, x: Tensor) -> Tensor:
        """A contiguous copy of a tensor between red zones."""
        whole = torch.full((x.numel() + 2 * WIDTH,), self._mark(x), dtype=x.dtype, device=x.device)
        inside = whole[WIDTH : WIDTH + x.numel()].view(x.shape)
        inside.copy_(x)
        self._zones += [(whole[:WIDTH], whole[:WIDTH].clone()), (whole[-WIDTH:], whole[-WIDTH:].clone())]
        return inside

    def check(self) -> None:
        """Check that no zone was written to."""
        assert self._zones
        for zone, before in self._zones:
            assert torch.equal(zone.view(torch.uint8), before.view(torch.uint8))

    @staticmethod
    def _mark(x: Tensor) -> float:
        return float("nan") if x.is_floating_point() else 77

    def _guarded(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.numel() == 0 or x.dtype == torch.bool or self._busy:
                return x
            self._busy = True
            try:
                return self.around(x)
            finally:
                self._busy = False

        return allocate_guarded

    _busy = False
