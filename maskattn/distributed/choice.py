"""Ring or gathered: what each moves and holds, and the rule that chooses.

Both bring a process the keys that it lacks, so that for one sequence over all processes they move as many bytes. The
gathered exchange attends once, to whole sequences, moves nothing of sequences that a process has no query of, and in
the backward sends gradients home in one step. The ring never holds more than three parts of the keys. So the gathered
exchange is taken as long as what it holds is little, or no more than the ring would hold; and the ring otherwise.

Dimension key: W processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskattn.distributed.gathered import gathered_rows
from maskattn.distributed.shards import Shards

__all__ = ["EXCHANGES", "Cost", "choose_exchange", "cost_of"]

EXCHANGES = ("ring", "gather")
GATHER_AT_MOST = 1 << 28  # bytes


@dataclass(frozen=True)
class Cost:
    """What an exchange asks of the process that it asks most of, in bytes.

    Attributes:
        forward: received in a forward.
        backward: received in a backward.
        held: keys, and what belongs to them, held at a time.
    """

    forward: int
    backward: int
    held: int


def cost_of(exchange: str, queries: Shards, keys: Shards, row_bytes: int, gradient_bytes: int) -> Cost:
    """The bytes of an exchange.

    Args:
        exchange: "ring" or "gather".
        queries, keys: how they are divided.
        row_bytes: of a key, its value and what else belongs to it.
        gradient_bytes: of the gradients of these, as the exchange sends them: float32 in a ring, the dtype of keys
            where they are gathered.
    """
    processes = range(keys.size)
    rows = [sum(each) for each in keys.lengths]
    if exchange == "ring":
        received = max(sum(rows) - rows[process] for process in processes)
        # Gradients make one step more, which brings them home; a group of one sends nothing.
        home = 0 if keys.size == 1 else sum(rows)
        return Cost(
            received * row_bytes,
            received * row_bytes + home * gradient_bytes,
            min(3, keys.size) * max(rows) * row_bytes,
        )
    gathered = [gathered_rows(queries, keys, process) for process in processes]
    received, held = max(from_others for _, from_others in gathered), max(held for held, _ in gathered)
    home = max(_rows_home(queries, keys, process) for process in processes)
    return Cost(received * row_bytes, received * row_bytes + home * gradient_bytes, held * row_bytes)


def choose_exchange(queries: Shards, keys: Shards, row_bytes: int) -> str:
    """The name of the exchange for a call; the same in every process.

    Args:
        queries, keys: how they are divided.
        row_bytes: of a key, its value and what else belongs to it.
    """
    held = cost_of("gather", queries, keys, row_bytes, 0).held
    return "gather" if held <= max(GATHER_AT_MOST, cost_of("ring", queries, keys, row_bytes, 0).held) else "ring"


def _rows_home(queries: Shards, keys: Shards, process: int) -> int:
    """Rows of gradients that a process gets from the others."""
    asked_by = [
        sum(1 for other, each in enumerate(queries.lengths) if each[b] and other != process)
        for b in range(keys.batch_size)
    ]
    return sum(count * times for count, times in zip(keys.lengths[process], asked_by, strict=True))
