"""What the operations over a process group have in common before they run: checks here, then agreement of all.

Dimension key: Tq and Tk rows of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from maskattn.distributed.agreement import agree
from maskattn.distributed.shards import Shards
from maskattn.options import Options
from maskattn.transforms import is_transformed

__all__ = ["check_rows", "check_shards", "describe", "refuse_dropout", "together"]

Prepared = TypeVar("Prepared")


def together(
    name: str, shards: Shards, prepare: Callable[[], Prepared], description: Callable[[Prepared], dict[str, object]]
) -> Prepared:
    """Check a call here, and whether all processes of the group make it.

    Args:
        name: of the operation.
        shards: whose group it is.
        prepare: checks the arguments.
        description: of what it returned, what must be the same in all processes.

    Raises:
        GroupError: calls differ, or another process refused its own.
        TypeError, ValueError: this process's arguments do not fit.
    """
    if not shards.checked:
        return prepare()
    prepared, problem, described = None, None, {}
    try:
        prepared = prepare()
        described = description(prepared)
    except (TypeError, ValueError) as error:
        problem = error
    agree(name, described, problem, shards.group, shards.device)
    assert prepared is not None  # agree raises where there is a problem
    return prepared


def check_shards(queries: object, keys: object) -> None:
    """Shards of one group, and of as many sequences."""
    for each in (queries, keys):
        if not isinstance(each, Shards):
            raise TypeError(
                f"an operation over a process group needs Shards, got {type(each).__name__}; make them of the Packing "
                "or cu_seqlens of this process's rows with Shards.of"
            )
    assert isinstance(queries, Shards)
    assert isinstance(keys, Shards)
    if queries.group is not keys.group or queries.batch_size != keys.batch_size:
        raise ValueError(
            "queries and keys must be divided among one group, into as many sequences, got "
            f"{queries.batch_size} of queries and {keys.batch_size} of keys in "
            f"{'one group' if queries.group is keys.group else 'two groups'}; make both Shards with the same group"
        )


def check_rows(name: str, x: Tensor, shards: Shards) -> None:
    """As many rows as the shards say lie here, where they lie."""
    if x.ndim < 1 or x.shape[0] != shards.rows or x.device != shards.device:
        raise ValueError(
            f"{name} must have the rows of its Shards, {shards.rows} on {shards.device} in process {shards.rank}, got "
            f"{name}.shape={tuple(x.shape)} on {x.device}; make the Shards of the rows that this process passes"
        )


def refuse_dropout(dropout_p: float, impl: str) -> None:
    """Weights are dropped by their places in whole sequences, which only the specification knows."""
    if dropout_p != 0 and impl != "reference":
        raise ValueError(
            f"impl={impl!r} drops weights by their places among the rows of one process, so that an operation over a "
            f"process group has no dropout, got dropout_p={dropout_p}; pass dropout_p=0, or impl='reference', which is "
            "slow"
        )


def describe(q: Tensor, differentiated: dict[str, Tensor | None], options: Options, impl: str) -> dict[str, object]:
    """What all processes must have alike: everything but rows and their numbers."""
    given = [x for x in (q, *differentiated.values()) if x is not None]
    if is_transformed(tuple(given)):
        raise ValueError(
            "operations over a process group have neither forward-mode derivatives nor torch.func transforms, got one; "
            "use backward(), or the functions of maskattn"
        )
    described: dict[str, object] = {
        "heads": q.shape[-2],
        "head width": q.shape[-1],
        "dtype": str(q.dtype),
        "impl": impl,
    }
    for x in fields(Options):
        value = getattr(options, x.name)
        if x.name == "dropout_seed":
            continue
        kind = None if value is None else (str(value.dtype), *value.shape[1:]) if isinstance(value, Tensor) else value
        described[x.name] = kind
    differs = torch.is_grad_enabled()
    described["inputs that need gradients"] = [
        name for name, x in differentiated.items() if differs and x is not None and x.requires_grad
    ]
    return described
