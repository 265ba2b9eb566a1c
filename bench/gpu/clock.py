"""Time on the device itself, for pytest-benchmark."""

from __future__ import annotations

import statistics
import time

import torch

__all__ = ["DeviceClock"]

# More than the L2 of any GPU (H200: 50 MiB; B200: 126 MiB).
CACHE_BYTES = 256 * 2**20

# No GPU's clock is faster, so that one that spins for so many cycles is held for a second at the least.
CYCLES_PER_SECOND = 3e9
SHORTEST_HOLD_SECONDS = 2e-4


class DeviceClock:
    """A pytest-benchmark timer, called before and after: 0, then the seconds between two events on the GPU.

    The device is held back until the call has been queued whole, so that the time is the device's alone, however long
    the Python takes that launched it; that is kept apart. Overwriting the L2 cache first makes every round start cold.
    """

    def __init__(self) -> None:
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        self._start: torch.cuda.Event | None = None
        self._began = 0.0
        self._hold = SHORTEST_HOLD_SECONDS
        self._host: list[float] = []

    def __call__(self) -> float:
        """Seconds since the call before, or 0 if that ended a round."""
        event = torch.cuda.Event(enable_timing=True)
        if self._start is None:
            torch.cuda.synchronize()
            torch.cuda._sleep(int(self._hold * CYCLES_PER_SECOND))
            self._cache.zero_()
            event.record()
            self._start = event
            self._began = time.perf_counter()
            return 0.0
        host = time.perf_counter() - self._began
        event.record()
        torch.cuda.synchronize()
        seconds = self._start.elapsed_time(event) / 1e3
        self._start = None
        self._host.append(host)
        # A call that waits for the device takes as long as that is held, which must not grow with it.
        self._hold = max(SHORTEST_HOLD_SECONDS, min(2 * host, 0.01))
        return seconds

    def host_seconds(self) -> float:
        """The median of how long the calls since the last reset took to return; one that compiled is not felt."""
        return statistics.median(self._host) if self._host else float("nan")

    def reset(self) -> None:
        """Forget the rounds of a case, even one that raised between the two calls."""
        self._start = None
        self._host = []
