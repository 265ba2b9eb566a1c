"""Time on the device itself, for pytest-benchmark."""

from __future__ import annotations

import torch

__all__ = ["DeviceClock"]

# More than the L2 of any GPU (H200: 50 MiB; B200: 126 MiB).
CACHE_BYTES = 256 * 2**20


class DeviceClock:
    """A pytest-benchmark timer, called before and after: 0, then the seconds between two events on the GPU.

    Overwriting the L2 cache first makes every round start cold and keeps the GPU busy while the call is launched,
    hence the time is the GPU's, not that of the Python that launched it, as ``triton.testing.do_bench`` does.
    """

    def __init__(self) -> None:
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        self._start: torch.cuda.Event | None = None

    def __call__(self) -> float:
        """Seconds since the call before, or 0 if that ended a round."""
        event = torch.cuda.Event(enable_timing=True)
        if self._start is None:
            torch.cuda.synchronize()
            self._cache.zero_()
            event.record()
            self._start = event
            return 0.0
        event.record()
        torch.cuda.synchronize()
        seconds = self._start.elapsed_time(event) / 1e3
        self._start = None
        return seconds

    def reset(self) -> None:
        """Forget a round that raised between the two calls."""
        self._start = None
