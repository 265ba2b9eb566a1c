"""A process group that was destroyed is gone at once: nothing of the package that is no longer in use refers to it.

A group that something refers to, if only a reference cycle, has threads. They abort the process if they release a
tensor while the interpreter shuts down.
"""

from __future__ import annotations

import gc
from pathlib import Path

import oracles
import pytest
import torch
import torch._dynamo  # imported while a group exists, as derivatives do, it would keep the group itself
import torch.distributed as dist
from distributed.processes import run_in_processes

from maskattn import distributed
from maskattn.distributed import Shards

LENGTHS = {0: [3, 2], 1: [2, 4]}


def threads_of_groups() -> list[str]:
    """The names of the threads of this process that serve a gloo group."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def attend(rank: int, exchange: str, other_queries: bool) -> None:
    shards = Shards.of(oracles.cu_seqlens(LENGTHS[rank]))
    queries = Shards.of(oracles.cu_seqlens(LENGTHS[1 - rank])) if other_queries else shards
    q = torch.randn(queries.rows, 2, 16, requires_grad=True)
    x = torch.randn(shards.rows, 2, 16, requires_grad=True)
    for _ in range(2):  # the second call has the plan of the first
        out = distributed.packed_attention(q, x, x, (queries, shards), impl="torch", exchange=exchange)
        out.sum().backward()


def left_after_attention(rank: int, exchange: str, other_queries: bool) -> tuple[list[str], list[str]]:
    attend(rank, exchange, other_queries)  # cycles that a first call may leave are torch's
    gc.collect()
    gc.disable()
    attend(rank, exchange, other_queries)
    before = threads_of_groups()
    dist.destroy_process_group()
    return before, threads_of_groups()


@pytest.mark.parametrize("other_queries", [False, True], ids=["same shards", "other shards of queries"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_destroyed_group_has_no_threads_left(exchange, other_queries):
    for before, after in run_in_processes(left_after_attention, 2, exchange, other_queries):
        assert before
        assert after == []
