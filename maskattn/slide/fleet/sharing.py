"""Settings of how a command's slides are shared among the processes that were started with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskattn.errors import ManifestError
from maskattn.slide.manifest import SlideJob
from maskattn.slide.unchanged import files_of

__all__ = ["Sharing", "bytes_of", "chosen_jobs", "parse_shard"]


@dataclass(frozen=True)
class Sharing:
    """How slides are shared among processes.

    Attributes:
        claim_timeout_s: seconds without a sign of life after which other processes take over a process's slides.
        retry_failed: retry slides that failed in another process before this one started.
        shard: "I/N" = only the I-th of every N slides; None = all, claimed one by one.
        limit: run at most so many slides, and leave the rest to other processes; None = all.
        order: "given", or "large-first" by the size of the files, so that no large slide remains for the end.
    """

    claim_timeout_s: float = 300.0
    retry_failed: bool = False
    shard: str | None = None
    limit: int | None = None
    order: Literal["given", "large-first"] = "given"


def chosen_jobs(jobs: Sequence[SlideJob], sharing: Sharing) -> list[SlideJob]:
    """Return the slides of this process's shard, in the order in which they are run.

    Raises:
        ManifestError: the shard is not of the form I/N with I from 1 to N.
    """
    jobs = list(jobs)
    if sharing.shard is not None:
        shard, shards = parse_shard(sharing.shard)
        jobs = jobs[shard - 1 :: shards]
    if sharing.order == "large-first":
        # Where a manifest names remote slides, their sizes are not known, and they come last.
        jobs.sort(key=lambda job: -(bytes_of(job.path) if job.origin is None else job.origin.total_bytes or 0))
    return jobs


def parse_shard(text: str) -> tuple[int, int]:
    """Return I and N of "I/N".

    Raises:
        ManifestError: the text is not of that form, or I is not from 1 to N.
    """
    shard, _, shards = text.partition("/")
    if not (shard.isdecimal() and shards.isdecimal() and 1 <= int(shard) <= int(shards)):
        raise ManifestError(
            f"--shard takes I/N, the I-th of N shares with I from 1 to N, got {text!r}; for example, give four "
            "processes 1/4, 2/4, 3/4 and 4/4"
        )
    return int(shard), int(shards)


def bytes_of(path: Path) -> int:
    """Return the size of a slide's files together."""
    return sum(file.stat().st_size for file in files_of(path))
