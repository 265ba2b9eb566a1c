"""Messages between the processes of a group: rows between two processes, sums, and small tables for all.

Processes are identified by their rank within the group. If one has ended, or exceeds the group's timeout, torch's error
is raised as a :class:`~maskattn.errors.GroupError`.

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
    """Pending messages, started on construction.

    Messages between two processes arrive in the order in which they were started. A tensor without elements is not
    sent.

    Args:
        sends: pairs (process, tensor to send).
        receives: pairs (process, tensor to fill).
        group: the process group.

    Raises:
        GroupError: a process has ended, or does not answer.
    """

    def __init__(
        self, sends: Iterable[tuple[int, Tensor]], receives: Iterable[tuple[int, Tensor]], group: dist.ProcessGroup
    ) -> None:
        # Sent tensors stay referenced until they have arrived.
        self._sent = [(peer, x.contiguous()) for peer, x in sends if x.numel()]
        with _answered():
            messages = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in self._sent]
            messages += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in receives if x.numel()]
            self._pending = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> None:
        """Wait until all messages have arrived; on a GPU, let the current stream wait for them."""
        with _answered():
            for each in self._pending:
                each.wait()
        self._sent, self._pending = [], []


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all processes' tensors, which have the same shape and dtype; ``x`` is overwritten with it."""
    with _answered():
        dist.all_reduce(x, group=group)
    return x


def broadcast_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return process 0's tensor; ``x`` is overwritten with it in the other processes."""
    with _answered():
        dist.broadcast(x, group=group, group_src=0)
    return x


def gather_alike(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the tensors of all processes, which have the same shape and dtype."""
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(group.size())]
    with _answered():
        dist.all_gather(found, x, group=group)
    return found


def gather_numbers(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Return the int64 numbers of all processes, the same count of each; synchronises with the device."""
    gathered = gather_alike(torch.tensor(numbers, dtype=torch.int64, device=device), group)
    return [x.tolist() for x in gathered]


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return a small object of each process."""
    found = [None] * group.size()
    with _answered():
        dist.all_gather_object(found, value, group=group)
    return found


def ordered(own: int, count: int) -> Iterator[int]:
    """Iterate over the processes whose rows this process holds after 0, 1, … steps of a ring, ``own`` first."""
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
            f"an error before the call, or exceeded the group's timeout (got {_first_line(error)}); look for the "
            "first error among the processes, and restart them"
        ) from error


def _first_line(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
