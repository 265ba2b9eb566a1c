"""Checks that the operations over a process group share: of this process's arguments, then of agreement of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from maskattn.distributed.agreement import agree
from maskattn.distributed.shards import Shards
from maskattn.distributed.transport import broadcast_first
from maskattn.options import Options
from maskattn.transforms import is_transformed

__all__ = ["check_rows", "check_shards", "describe", "together", "with_seed_of_first"]

Prepared = TypeVar("Prepared")


def together(
    name: str, shards: Shards, prepare: Callable[[], Prepared], description: Callable[[Prepared], dict[str, object]]
) -> Prepared:
    """Check a call in this process, and that all processes of the group make the same call.

    Args:
        name: the operation's name.
        shards: the shards whose group is called; without ``checked`` the processes are not compared.
        prepare: checks the arguments of this process.
        description: maps the result of ``prepare`` to the values that must be the same in all processes.

    Returns:
        The result of ``prepare``.

    Raises:
        GroupError: the calls differ, or another process refused its arguments.
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
    assert prepared is not None  # agree has raised any problem
    return prepared


def check_shards(queries: object, keys: object) -> None:
    """Check that queries and keys have Shards of the same group, with the same number of sequences.

    Raises:
        TypeError: one of them is not Shards.
        ValueError: their groups or numbers of sequences differ.
    """
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
    """Check that a tensor has as many rows as its shards state for this process, on their device.

    Raises:
        ValueError: the number of rows or the device differs.
    """
    if x.ndim < 1 or x.shape[0] != shards.rows or x.device != shards.device:
        raise ValueError(
            f"{name} must have the rows of its Shards, {shards.rows} on {shards.device} in process {shards.rank}, got "
            f"{name}.shape={tuple(x.shape)} on {x.device}; make the Shards of the rows that this process passes"
        )


def with_seed_of_first(options: Options, shards: Shards) -> Options:
    """Return the options with the dropout seed of process 0, so that all processes drop the same weights."""
    seed = options.dropout_seed
    return options if seed is None else replace(options, dropout_seed=broadcast_first(seed, shards.group))


def describe(q: Tensor, differentiated: dict[str, Tensor | None], options: Options, impl: str) -> dict[str, object]:
    """Return the values that must be the same in all processes: everything but rows and their numbers.

    Args:
        q: the queries.
        differentiated: the tensors by name that may need gradients; None for those not given.
        options: the options of the call.
        impl: the implementation.

    Raises:
        ValueError: a tensor belongs to a torch.func transform or forward-mode derivative.
    """
    given = [x for x in (q, *differentiated.values()) if x is not None]
    if is_transformed(tuple(given)):
        raise ValueError(
            "operations over a process group support neither forward-mode derivatives nor torch.func transforms, got "
            "one; use backward(), or the functions of maskattn"
        )
    described: dict[str, object] = {
        "heads": q.shape[-2],
        "head width": q.shape[-1],
        "dtype": str(q.dtype),
        "impl": impl,
    }
    for option in fields(Options):
        value = getattr(options, option.name)
        if option.name == "dropout_seed":
            continue
        kind = None if value is None else (str(value.dtype), *value.shape[1:]) if isinstance(value, Tensor) else value
        described[option.name] = kind
    with_gradients = torch.is_grad_enabled()
    described["inputs that need gradients"] = [
        name for name, x in differentiated.items() if with_gradients and x is not None and x.requires_grad
    ]
    return described
