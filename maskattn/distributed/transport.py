"""Messages between the processes of a group: rows from one to another, sums, and small tables that all get.

Processes are counted within the group. What torch raises where one of them is gone, or late beyond the group's timeout,
is a :class:`~maskattn.errors.GroupError`.

Dimension key: W processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.errors import GroupError

__all__ = ["Transfer", "add_up", "broadcast_first", "gather_alike", "gather_numbers", "gather_objects", "ordered"]


class Transfer:
    """Messages on their way.

    Args:
        sends: pairs (process, tensor) to send.
        receives: pairs (process, tensor) to fill.
        group: of the processes.

    Two processes' messages to each other arrive in the order in which they were started. A tensor without elements is
    not sent.
    """

    def __init__(
        self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]], group: dist.ProcessGroup
    ) -> None:
        # What is sent stays referenced until it has arrived.
        self._sent = [(peer, x.contiguous()) for peer, x in sends if x.numel()]
        with _answered():
            messages = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in self._sent]
            messages += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in receives if x.numel()]
            self._pending = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> None:
        """Until all have arrived; on a GPU, until its stream has them."""
        with _answered():
            for each in self._pending:
                each.wait()
        self._sent, self._pending = [], []


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all processes' tensors, which are alike; ``x`` itself is overwritten."""
    with _answered():
        dist.all_reduce(x, group=group)
    return x


def broadcast_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Process 0's tensor; ``x`` itself is overwritten elsewhere."""
    with _answered():
        dist.broadcast(x, group=group, group_src=0)
    return x


def gather_alike(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """All processes' tensors, which are alike."""
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(group.size())]
    with _answered():
        dist.all_gather(found, x, group=group)
    return found


def gather_numbers(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """As many int64 of each process; waits for the device."""
    gathered = gather_alike(torch.tensor(numbers, dtype=torch.int64, device=device), group)
    return [x.tolist() for x in gathered]


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """A small object of each process."""
    found = [None] * group.size()
    with _answered():
        dist.all_gather_object(found, value, group=group)
    return found


def ordered(own: int, count: int) -> Iterator[int]:
    """The processes of a ring, from ``own`` backwards: whose rows lie here after 0, 1, … steps."""
    return ((own - step) % count for step in range(count))


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, GroupError):
            raise
        raise GroupError(
            "every process of a group must take part in a call over it, and one did not answer: it has ended, raised "
            f"an error before it, or is late beyond the group's timeout (got {_first_line(error)}); look for the "
            "first error among the processes, and start them anew"
        ) from error


def _first_line(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
