"""Check that all processes of a group make the same call, before any of them sends what another does not expect.

The processes exchange a hash of the call, a few bytes; only if hashes differ do they exchange descriptions of the call.
A shape that differs, or arguments that one process refuses, thus raises an error in every process instead of a hang.
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
    """Raise an error in every process if the processes' calls differ, or one of them has a problem.

    Args:
        call: the operation's name.
        description: the values that must be the same in all processes; they are compared by their ``repr``.
        problem: the error that this process would raise by itself, or None.
        group: the process group.
        device: a device whose tensors the group's backend accepts; this function synchronises with it.

    Raises:
        GroupError: the calls differ, or another process has a problem.
        Exception: the problem of this process.
    """
    digest = hashlib.blake2b(repr((call, dict(description))).encode(), digest_size=8).digest()
    own = [int(problem is not None), int.from_bytes(digest, "little", signed=True)]
    found = gather_numbers(own, group, device)
    if all(each == [0, found[0][1]] for each in found):
        return
    calls = gather_objects((call, dict(description), None if problem is None else str(problem)), group)
    if problem is not None:
        raise problem
    for process, (_, _, reason) in enumerate(calls):
        if reason is not None:
            raise GroupError(
                f"{call} over a process group must be called by all its processes, got arguments that process "
                f"{process} refused: {reason}"
            )
    raise GroupError(_difference(call, calls))


def _difference(call: str, calls: list[tuple[str, dict[str, object], str | None]]) -> str:
    """Return an error message on the first process whose call differs from that of process 0."""
    first_call, first, _ = calls[0]
    for process, (other_call, other, _) in enumerate(calls):
        if other_call != first_call:
            return (
                f"all processes of a group must call the same operation, got {first_call} in process 0 and "
                f"{other_call} in process {process}; let every process run the same part of the program"
            )
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                return (
                    f"{call} over a process group needs the same {name} in every process, got {first.get(name)} in "
                    f"process 0 and {other.get(name)} in process {process}; only numbers of rows may differ"
                )
    return f"{call} was described differently by the processes; run the same version of the package in all of them"
