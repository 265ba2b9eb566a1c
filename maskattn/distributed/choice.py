"""The costs of the ring and the gathered exchange in bytes, and the rule that chooses between them.

Both bring a process the keys that it lacks, and for one sequence on all processes they move the same number of bytes.
The gathered exchange attends once, to whole sequences, moves no keys of sequences of which a process has no queries,
and returns gradients to their owners in one step of the backward pass. The ring never holds more than three processes'
keys. The gathered exchange is therefore chosen if the keys that it holds are few, or no more than in the ring. Between
two processes on one CPU their times were equal (``bench/results/context_parallel.md``), so the limit bounds memory.

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
    """The cost of an exchange in bytes, the maximum over the processes.

    Attributes:
        forward: bytes received in a forward pass.
        backward: bytes received in a backward pass.
        held: bytes of the keys, values, biases and coordinates held at a time.
    """

    forward: int
    backward: int
    held: int


def cost_of(exchange: str, queries: Shards, keys: Shards, row_bytes: int, gradient_bytes: int) -> Cost:
    """Return the cost of an exchange.

    Args:
        exchange: "ring" or "gather".
        queries, keys: the shards of queries and keys.
        row_bytes: bytes of a key with its value, bias and coordinates.
        gradient_bytes: bytes of their gradients as the exchange sends them: in float32 in a ring, in the dtype of the
            keys if they are gathered.
    """
    processes = range(keys.size)
    rows = [sum(each) for each in keys.lengths]
    if exchange == "ring":
        received = max(sum(rows) - rows[process] for process in processes)
        # Gradients take one step more, back to their owners; a group of one sends nothing.
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
    """Return the name of the exchange for a call, the same in every process.

    Args:
        queries, keys: the shards of queries and keys.
        row_bytes: bytes of a key with its value, bias and coordinates.
    """
    held = cost_of("gather", queries, keys, row_bytes, 0).held
    return "gather" if held <= max(GATHER_AT_MOST, cost_of("ring", queries, keys, row_bytes, 0).held) else "ring"


def _rows_home(queries: Shards, keys: Shards, process: int) -> int:
    """Return the number of rows of gradients that a process receives from the others."""
    asked_by = [
        sum(1 for other, each in enumerate(queries.lengths) if each[b] and other != process)
        for b in range(keys.batch_size)
    ]
    return sum(count * times for count, times in zip(keys.lengths[process], asked_by, strict=True))
