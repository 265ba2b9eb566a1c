"""Time on the device itself, for pytest-benchmark."""

from __future__ import annotations

import statistics
import time

import torch

__all__ = ["DeviceClock"]

# More than the L2 of any GPU (H200: 50 MiB; B200: 126 MiB).
CACHE_BYTES = 256 * 2**20

# No GPU's clock is faster, so that spinning for this many cycles takes at least a second.
CYCLES_PER_SECOND = 3e9
SHORTEST_HOLD_SECONDS = 2e-4


class DeviceClock:
    """A pytest-benchmark timer, called before and after a round: 0, then the seconds between two events on the GPU.

    The device is held back until the call has been queued completely, so that the time is that of the device, however
    long the launching Python code takes, which is recorded separately. The L2 cache is overwritten first, so that every
    round starts cold.
    """

    def __init__(self) -> None:
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        self._start: torch.cuda.Event | None = None
        self._began = 0.0
        self._hold = SHORTEST_HOLD_SECONDS
        self._host: list[float] = []

    def __call__(self) -> float:
        """Return the seconds since the previous call, or 0 if that ended a round."""
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
        # A call that waits for the device takes as long as the hold, which must not grow in turn.
        self._hold = max(SHORTEST_HOLD_SECONDS, min(2 * host, 0.01))
        return seconds

    def host_seconds(self) -> float:
        """Return the median time until a call since the last reset returned; one that compiled hardly affects it."""
        return statistics.median(self._host) if self._host else float("nan")

    def reset(self) -> None:
        """Forget the rounds of a case, even one that raised between the two calls."""
        self._start = None
        self._host = []
