"""Time of calls that are compared: all run in turn, round after round, in one process, and their medians are compared.

Whatever disturbs the machine for a while then disturbs all of them. With one thread it is processor time, which others
on the machine disturb less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["kind_of_time", "median_ratio", "medians", "rounds_of"]

Call = Callable[[], object]
Clock = Callable[[], float]

SHORT_S = 1e-2  # a shorter call is repeated for about as long
MOST_REPEATS = 200


def medians(
    calls: Mapping[str, Call], rounds: int, *, repeat_short: bool = False, clock: Clock | None = None
) -> dict[str, float]:
    """Median seconds of each call over ``rounds``; the arguments are those of :func:`rounds_of`."""
    timed = rounds_of(calls, rounds, repeat_short=repeat_short, clock=clock)
    return {name: statistics.median(seconds) for name, seconds in timed.items()}


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of one call's seconds divided by another's of the same round.

    A round's two times lie close together, so that what slows the machine down for some rounds cancels.
    """
    return statistics.median(mine / theirs for mine, theirs in zip(seconds, others, strict=True))


def rounds_of(
    calls: Mapping[str, Call], rounds: int, *, repeat_short: bool = False, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Seconds of each call in each of ``rounds``, after one that warms up.

    Args:
        calls: what is compared, by name.
        rounds: how often each is timed; the order turns round from one to the next, so that none always comes first.
        repeat_short: whether a time of a short call is the mean of many calls.
        clock: what tells the seconds; None for processor time where torch has one thread, else wall time.
    """
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for number in range(rounds + 1):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start = clock()
            for _ in range(repeats[name]):
                calls[name]()
            seconds[name].append((clock() - start) / repeats[name])
            if repeat_short:
                repeats[name] = max(1, min(MOST_REPEATS, int(SHORT_S / max(seconds[name][-1], 1e-6))))
    return {name: times[1:] for name, times in seconds.items()}


def kind_of_time() -> str:
    """How the times of this process are to be called in a table."""
    return "processor time" if torch.get_num_threads() == 1 else "wall time"
