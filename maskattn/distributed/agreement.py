"""Whether all processes of a group make the same call, before any of them sends what another does not await.

A hash of the call goes round in a few bytes; only where hashes differ do the processes tell each other what they meant.
So a shape that differs, or arguments that one process refuses, is an error in every process and no hang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from maskattn.distributed.transport import gather_numbers, gather_objects
from maskattn.errors import GroupError

__all__ = ["agree"]


def agree(
    call: str,
    description: Mapping[str, object],
    problem: Exception | None,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Raise, in every process, where the processes' calls differ or one of them has a problem.

    Args:
        call: the operation's name.
        description: what must be the same everywhere; values whose ``repr`` tells them apart.
        problem: what this process would raise by itself.
        group: of the processes.
        device: on which the group's backend takes tensors; it is waited for.

    Raises:
        GroupError: descriptions differ, or another process has a problem.
        Exception: this process's own problem.
    """
    digest = hashlib.blake2b(repr((call, dict(description))).encode(), digest_size=8).digest()
    own = [int(problem is not None), int.from_bytes(digest, "little", signed=True)]
    found = gather_numbers(own, group, device)
    if all(each == [0, found[0][1]] for each in found):
        return
    told = gather_objects((call, dict(description), None if problem is None else str(problem)), group)
    if problem is not None:
        raise problem
    for process, (_, _, reason) in enumerate(told):
        if reason is not None:
            raise GroupError(
                f"{call} over a process group is called by all its processes or by none, and process {process} refused "
                f"its arguments: {reason}"
            )
    raise GroupError(_difference(call, told))


def _difference(call: str, told: list[tuple[str, dict[str, object], str | None]]) -> str:
    """The first process whose call is not that of process 0, and in what."""
    first_call, first, _ = told[0]
    for process, (other_call, other, _) in enumerate(told):
        if other_call != first_call:
            return (
                f"all processes of a group must call the same operation, got {first_call} in process 0 and "
                f"{other_call} in process {process}; let every process take the same way through the program"
            )
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                return (
                    f"{call} over a process group needs the same {name} in every process, got {first.get(name)} in "
                    f"process 0 and {other.get(name)} in process {process}; only the numbers of rows may differ"
                )
    return f"{call} was described differently by the processes; run the same version of the package in all of them"
