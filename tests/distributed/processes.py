"""Runs a function in several processes that form a gloo group, and gives back what each returned or raised."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

Work = Callable[..., Any]


def run_in_processes(work: Work, count: int, *arguments: Any, timeout_s: float = 60) -> list[Any]:
    """What ``work(rank, *arguments)`` returned in each of ``count`` processes; an exception as its type and text."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_one, (work, count, folder, timeout_s, arguments), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank: int, work: Work, count: int, folder: str, timeout_s: float, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout_s),
    )
    torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
    # DistributedDataParallel keeps its group, whose threads abort a process if they release a tensor while the
    # interpreter shuts down (https://github.com/pytorch/pytorch/pull/179291): it ends without that.
    os._exit(0)
