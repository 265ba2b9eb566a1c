"""Lists of a fleet's slides, one file for each command, which the command's processes share."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from maskattn.slide.fleet.folders import write_text
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text

__all__ = ["list_slides", "listed_slides"]


def list_slides(root: Path, jobs: Sequence[SlideJob]) -> str:
    """Write the ids of a command's slides unless another process has, and return the name of the list."""
    text = "".join(f"{as_text(job.slide_id)}\n" for job in jobs)
    name = f"slides-{hashlib.sha256(text.encode()).hexdigest()[:12]}.txt"
    with contextlib.suppress(OSError):  # only `maskattn status` reads it
        if not (root / name).exists():
            write_text(root / name, text)
    return name


def listed_slides(root: Path, name: str) -> list[str]:
    """Return the ids in a list; empty if the list does not exist."""
    try:
        return (root / Path(name).name).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
