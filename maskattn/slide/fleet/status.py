"""The progress of a run, read only from its output folder, even after all its processes were killed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskattn.errors import OutputError
from maskattn.slide.fleet.claims import owner_of, slide_of
from maskattn.slide.fleet.fleet import FOLDER
from maskattn.slide.fleet.lists import listed_slides
from maskattn.slide.fleet.members import members_of, read_member
from maskattn.slide.fleet.process import Process
from maskattn.slide.fleet.rows import rows_beside
from maskattn.slide.names import as_text
from maskattn.slide.summary import read_summary

__all__ = ["ProcessStatus", "RunStatus", "run_status"]


@dataclass(frozen=True)
class ProcessStatus:
    """A process of a run.

    Attributes:
        name: its pid and its machine's name.
        began: its start time by its machine's clock.
        ended: whether it is known to have ended without leaving; unknown, hence False, for other machines.
        slide_id: the slide that it has claimed; None between two slides.
        claimed_at: the time of the claim by its machine's clock; "" if it cannot be read.
        slides_done: the number of slides that it has ended.
        slides_per_hour: the rate of these slides; None before the first.
    """

    name: str
    began: str
    ended: bool
    slide_id: str | None
    claimed_at: str
    slides_done: int
    slides_per_hour: float | None


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run.

    Attributes:
        total: the number of slides that its processes were given, or of those in the summary if no process is at work.
        ok: the number of slides that have outputs of this run.
        skipped: the number of slides that an earlier run had finished.
        failed: (slide, reason) of each failed slide.
        processes: its processes, sorted by name.
        seconds_left: seconds until all slides are done, at the rate so far; None if it is not known.
    """

    total: int
    ok: int
    skipped: int
    failed: tuple[tuple[str, str], ...]
    processes: tuple[ProcessStatus, ...]
    seconds_left: float | None

    @property
    def done(self) -> int:
        """The number of slides that are ok, skipped or failed."""
        return self.ok + self.skipped + len(self.failed)

    @property
    def left(self) -> int:
        """The number of slides that have not ended."""
        return self.total - self.done

    @property
    def slides_per_hour(self) -> float:
        """The total rate of all running processes."""
        return sum(one.slides_per_hour or 0.0 for one in self.processes if not one.ended)


def run_status(out_dir: Path) -> RunStatus:
    """Return the progress of the run in an output folder.

    Args:
        out_dir: the output folder, the ``--out`` of infer or extract.

    Raises:
        OutputError: the folder contains no run, or its summary cannot be read.
    """
    root = out_dir / FOLDER
    try:
        rows = read_summary(out_dir / "summary.csv")
    except (OSError, ValueError) as error:
        raise OutputError(f"a run's summary must be readable, got {as_text(out_dir)}: {error}") from error
    for _, buffered in rows_beside(root / "rows"):
        rows |= buffered
    members = {token: read_member(root / "members", token) or {} for token in members_of(root / "members")}
    if not rows and not members:
        raise OutputError(
            f"the status of a run is read from its output folder, got {as_text(out_dir)}, which contains no run; give "
            "the --out of infer or extract"
        )
    given = {slide for about in members.values() for slide in listed_slides(root, str(about.get("slides", "")))}
    if given:
        rows = {slide_id: row for slide_id, row in rows.items() if slide_id in given}
    claims = _claims(root / "claims")
    again = {slide for token, (slide, _) in claims.items() if token in members}
    rows = {slide_id: row for slide_id, row in rows.items() if slide_id not in again}
    processes = tuple(sorted((_process(about, claims.get(token)) for token, about in members.items()), key=str))
    statuses = [row["status"] for row in rows.values()]
    failed = tuple((slide_id, row["reason"]) for slide_id, row in rows.items() if row["status"] == "failed")
    status = RunStatus(
        len(given) or len({*rows, *again}),
        statuses.count("ok"),
        statuses.count("skipped"),
        failed,
        processes,
        seconds_left=None,
    )
    if status.slides_per_hour:
        return RunStatus(**{**vars(status), "seconds_left": status.left / status.slides_per_hour * 3600})
    return status


def _claims(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the slide and the time of each member's last claim, by the member's token."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime_ns if path.exists() else 0):
        at = ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            at = str(json.loads(path.read_text(encoding="utf-8"))["at"])
        found[owner_of(path)] = (slide_of(path.name), at)
    return found


def _process(about: dict[str, Any], claim: tuple[str, str] | None) -> ProcessStatus:
    try:
        process = Process.of(about["process"])
        name, ended = str(process), process.has_ended()
    except (KeyError, ValueError, TypeError):
        name, ended = "an unknown process", False
    done, seconds = int(about.get("done", 0)), float(about.get("seconds", 0.0))
    return ProcessStatus(
        name=name,
        began=str(about.get("began", "")),
        ended=ended,
        slide_id=claim[0] if claim else None,
        claimed_at=claim[1] if claim else "",
        slides_done=done,
        slides_per_hour=3600 * done / seconds if seconds > 0 else None,
    )
