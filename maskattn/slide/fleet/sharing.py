"""How the slides of one command are shared among the processes that were started with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskattn.errors import ManifestError
from maskattn.slide.manifest import SlideJob

__all__ = ["Sharing", "chosen_jobs", "parse_shard"]


@dataclass(frozen=True)
class Sharing:
    """How slides are shared.

    Attributes:
        claim_timeout_s: a process that gave no sign for so long has ended, and others take its slides over.
        retry_failed: try slides again that failed in another process before this one began.
        shard: "I/N" = of every N slides the I-th alone; None = all, claimed one by one.
        limit: run at most so many slides, and leave the rest to others; None = all.
        order: "given", or "large-first" by the size of the files, so that no large one is left for the end.
    """

    claim_timeout_s: float = 300.0
    retry_failed: bool = False
    shard: str | None = None
    limit: int | None = None
    order: Literal["given", "large-first"] = "given"


def chosen_jobs(jobs: Sequence[SlideJob], sharing: Sharing) -> list[SlideJob]:
    """The slides of this process's shard, in the order in which they are to be run.

    Raises:
        ManifestError: the shard is none.
    """
    jobs = list(jobs)
    if sharing.shard is not None:
        shard, shards = parse_shard(sharing.shard)
        jobs = jobs[shard - 1 :: shards]
    if sharing.order == "large-first":
        jobs.sort(key=lambda job: -_bytes(job.path))
    return jobs


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of "I/N".

    Raises:
        ManifestError: it is not of that form, or I is not one of 1 to N.
    """
    shard, _, shards = text.partition("/")
    if not (shard.isdecimal() and shards.isdecimal() and 1 <= int(shard) <= int(shards)):
        raise ManifestError(
            f"--shard takes I/N, the I-th of N shares with I from 1 to N, got {text!r}; give 1/4, 2/4, 3/4 and 4/4 to "
            "four processes"
        )
    return int(shard), int(shards)


def _bytes(path: Path) -> int:
    """A slide's size: of a file, with the folder of its name, where MIRAX keeps the pixels, or of a folder's files."""
    beside = path.with_suffix("") if path.suffix else path
    found = [path] if path.is_file() else []
    if beside.is_dir():
        found += [Path(entry.path) for entry in os.scandir(beside) if entry.is_file()]
    return sum(one.stat().st_size for one in found)
