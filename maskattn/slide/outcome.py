"""The outcome of a slide in a run, and its row of ``summary.csv``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Outcome", "Status"]

Status = Literal["ok", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a slide; each kind of run extends it with its record of the slide.

    Attributes:
        slide_id: the job's id.
        status: "ok", "skipped" (finished by an earlier run, whose record is read) or "failed".
        reason: why the slide failed or was skipped; empty if ok.
        seconds: wall time of this run in seconds.
        elsewhere: whether another process ran the slide, so that this process has no record of it.
    """

    slide_id: str
    status: Status
    reason: str
    seconds: float
    elsewhere: bool = field(default=False, kw_only=True)

    def row(self) -> dict[str, str]:
        """Return the outcome as a row of ``summary.csv``."""
        seconds = f"{self.seconds:.2f}"
        return {"slide_id": self.slide_id, "status": self.status, "reason": self.reason, "seconds": seconds}
