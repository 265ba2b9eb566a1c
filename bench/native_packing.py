"""Packing on the CPU beside torch's indexing and a plain copy: ``python bench/native_packing.py``, Markdown on stdout.

The two that are compared run in turn, round after round, in one process, so that either finds the caches as the other
leaves them; medians are taken. With one thread it is CPU time, which others on the machine disturb less. A copy goes to
memory that is there already; what pack, unpack and torch's functions return is allocated by each call, as in use.

Dimension key: B sequences, N tokens, T packed tokens, C channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from maskattn import Packing, pack, packing, unpack

Calls = dict[str, Callable[[], object]]

SIZES = ((1, 197), (64, 197), (1, 1024), (1, 4096), (1, 16384), (1, 65536))
SHARES = (0.06, 0.3, 0.5, 1.0)
MASKS = ((1, 197), (64, 197), (1, 16384), (512, 256), (1, 65536))


def medians(calls: Calls, rounds: int) -> dict[str, float]:
    """Seconds of each call, all called once a round, short ones many times over; the first round warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    times = dict.fromkeys(calls, 1)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            for _ in range(times[name]):
                call()
            seconds[name].append((clock() - start) / times[name])
            times[name] = max(1, min(200, int(1e-3 / max(seconds[name][-1], 1e-6))))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def mask(B: int, N: int, share: float, piece: bool) -> Tensor:
    """Kept tokens at random, or as one square of each sequence's grid, a band where N is no square."""
    if not piece:
        return torch.rand(B, N) < share if share < 1 else torch.ones(B, N, dtype=torch.bool)
    rows = int(N**0.5) if int(N**0.5) ** 2 == N else 1
    side = (share * rows * rows) ** 0.5 if rows > 1 else share * N
    grid = torch.zeros(B, rows, N // rows, dtype=torch.bool)
    first = rows // 5
    grid[:, first : first + (round(side) if rows > 1 else 1), first : first + round(side)] = True
    return grid.flatten(1)


def by_torch(x: Tensor, rows: Tensor, places: Packing) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """What pack and unpack do where there is no extension."""
    flat = x.flatten(0, 1)
    return (
        lambda: flat.index_select(0, places.indices),
        lambda: rows.new_zeros(flat.shape).index_copy_(0, places.indices, rows),
    )


def moves(B: int, N: int, C: int, dtype: torch.dtype, share: float, piece: bool, rounds: int) -> str:
    """A row of the table."""
    places = Packing.from_keep(mask(B, N, share, piece))
    x = torch.randn(B, N, C).to(dtype)
    rows = pack(x, places)
    rows_again, x_again = torch.empty_like(rows), torch.empty_like(x)
    torch_pack, torch_unpack = by_torch(x, rows, places)
    assert torch.equal(torch_pack(), rows)
    assert torch.equal(torch_unpack().view(x.shape), unpack(rows, places))
    took: dict[str, float] = {}
    for pair in (
        {"copy T": lambda: rows_again.copy_(rows)},
        {"torch pack": torch_pack, "pack": lambda: pack(x, places)},
        {"copy N": lambda: x_again.copy_(x)},
        {"torch unpack": torch_unpack, "unpack": lambda: unpack(rows, places)},
    ):
        took |= medians(pair, rounds)
    µs = {name: f"{1e6 * value:,.0f}" for name, value in took.items()}
    return (
        f"| {B} × {N:,} | {C} | {str(dtype)[6:]} | {share}{', one piece' if piece else ''} "
        f"| {µs['copy T']} | {µs['torch pack']} | {µs['pack']} | {took['torch pack'] / took['pack']:.2f} "
        f"| {µs['copy N']} | {µs['torch unpack']} | {µs['unpack']} | {took['torch unpack'] / took['unpack']:.2f} |"
    )


def reading(B: int, N: int, rounds: int) -> str:
    """A row of the masks' table."""
    keep, has_extension = mask(B, N, 0.3, False), packing.has_extension

    def without() -> Packing:
        packing.has_extension = lambda: False  # type: ignore[assignment]
        try:
            return Packing.from_keep(keep)
        finally:
            packing.has_extension = has_extension

    took = medians({"torch": without, "extension": lambda: Packing.from_keep(keep)}, rounds)
    ratio = took["torch"] / took["extension"]
    return f"| {B} × {N:,} | {1e6 * took['torch']:,.1f} | {1e6 * took['extension']:,.1f} | {ratio:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    kind = "CPU time" if given.threads == 1 else "wall time"
    print(f"\n## {given.threads} thread{'s' * (given.threads > 1)}, {kind}, medians of {given.rounds} rounds, µs\n")
    print("| B × N | C | dtype | f | copy of T rows | torch | pack | ratio | copy of N rows | torch | unpack | ratio |")
    print("|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for B, N in SIZES:
        for C in (384, 1024):
            for dtype in (torch.float32, torch.bfloat16):
                for share in SHARES:
                    print(moves(B, N, C, dtype, share, False, given.rounds), flush=True)
                print(moves(B, N, C, dtype, 0.3, True, given.rounds), flush=True)
    print("\n| mask, f = 0.3 | from_keep on torch's functions | from_keep | ratio |\n|---|---:|---:|---:|")
    for B, N in MASKS:
        print(reading(B, N, given.rounds), flush=True)


if __name__ == "__main__":
    main()
