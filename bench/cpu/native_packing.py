"""Packing on the CPU with and without the C++ extension: ``python -m bench.cpu.native_packing``, Markdown on stdout.

Without the extension, the same operations use torch's index_select and index_copy. Both run in interleaved rounds of
alternating order in one process, and medians are printed. With one thread, times are processor time, which other work
on the machine disturbs less. The copy, which is the limit, writes to existing memory; each call of pack and unpack
allocates its result, as in use.

Dimension key: B sequences, N tokens, T packed tokens, C channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.timing import medians
from maskattn import Packing, pack, packing, unpack

SIZES = ((1, 197), (64, 197), (1, 4096), (1, 16384), (1, 65536))
SHARES = (0.06, 0.3, 0.5, 1.0)
MASKS = ((1, 197), (64, 197), (1, 16384), (512, 256), (1, 65536))


def mask(B: int, N: int, share: float, piece: bool) -> Tensor:
    """Keep tokens at random, or as one square in each sequence's grid (a band if N is not a square number)."""
    if not piece:
        return torch.rand(B, N) < share if share < 1 else torch.ones(B, N, dtype=torch.bool)
    rows = int(N**0.5) if int(N**0.5) ** 2 == N else 1
    side = (share * rows * rows) ** 0.5 if rows > 1 else share * N
    grid = torch.zeros(B, rows, N // rows, dtype=torch.bool)
    first = rows // 5
    grid[:, first : first + (round(side) if rows > 1 else 1), first : first + round(side)] = True
    return grid.flatten(1)


def without_extension(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call with torch's own functions in place of the extension."""
    has_extension = packing.has_extension

    def run() -> Any:
        packing.has_extension = lambda: False  # put back below
        try:
            return call()
        finally:
            packing.has_extension = has_extension

    return run


def pair(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Measure the microseconds without the extension and with it."""
    took = medians({"without": without_extension(call), "with": call}, rounds, repeat_short=True)
    return 1e6 * took["without"], 1e6 * took["with"]


def moves(B: int, N: int, C: int, dtype: torch.dtype, share: float, piece: bool, rounds: int) -> str:
    """Format a row of the table."""
    places = Packing.from_keep(mask(B, N, share, piece))
    x = torch.randn(B, N, C).to(dtype)
    rows = pack(x, places)
    rows_again, x_again = torch.empty_like(rows), torch.empty_like(x)
    cells = []
    for copy, move in (
        (lambda: rows_again.copy_(rows), lambda: pack(x, places)),
        (lambda: x_again.copy_(x), lambda: unpack(rows, places)),
    ):
        assert torch.equal(without_extension(move)(), move())
        limit = 1e6 * medians({"copy": copy}, rounds, repeat_short=True)["copy"]
        torchs, ours = pair(move, rounds)
        cells += [f"{limit:,.0f}", f"{torchs:,.0f}", f"{ours:,.0f}", f"{torchs / ours:.2f}"]
    kept = f"{share}{', one piece' if piece else ''}"
    return f"| {B} × {N:,} | {C} | {str(dtype)[6:]} | {kept} | {' | '.join(cells)} |"


def reading(B: int, N: int, rounds: int) -> str:
    """Format a row of the table of masks."""
    keep = mask(B, N, 0.3, False)
    torchs, ours = pair(lambda: Packing.from_keep(keep), rounds)
    return f"| {B} × {N:,} | {torchs:,.1f} | {ours:,.1f} | {torchs / ours:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    kind = "CPU time" if given.threads == 1 else "wall time"
    print(f"\n## {given.threads} thread{'s' * (given.threads > 1)}, {kind}, medians of {given.rounds} rounds, µs\n")
    print("| B × N | C | dtype | f | copy of T rows | pack without | with | ratio ", end="")
    print("| copy of N rows | unpack without | with | ratio |")
    print("|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for B, N in SIZES:
        for C in (384, 1024):
            for dtype in (torch.float32, torch.bfloat16):
                for share in SHARES:
                    print(moves(B, N, C, dtype, share, False, given.rounds), flush=True)
                print(moves(B, N, C, dtype, 0.3, True, given.rounds), flush=True)
    if given.threads > 1:
        return  # a mask is read with one thread
    print("\n| mask, f = 0.3 | from_keep without | with | ratio |\n|---|---:|---:|---:|")
    for B, N in MASKS:
        print(reading(B, N, given.rounds), flush=True)


if __name__ == "__main__":
    main()
