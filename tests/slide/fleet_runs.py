"""Slides that take milliseconds, run as the pipeline runs real ones; run as a script, this is one process of a fleet.

python tests/slide/fleet_runs.py OUT SLIDES HOLD [CLAIM_TIMEOUT_S [STALLED_DRIVE]]

Each slide waits while the file HOLD exists; slide s003 is read from STALLED_DRIVE, a pipe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, Popen

from maskattn.errors import OutputError
from maskattn.slide.each_slide import OnTiles, run_each
from maskattn.slide.fleet.claims import Claim
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.manifest import SlideJob
from maskattn.slide.outcome import Status
from maskattn.slide.output_folder import clear_leftovers, slide_folder, sweep
from maskattn.slide.prediction import SlideOutcome
from maskattn.slide.remote import CacheSettings
from maskattn.slide.summary import read_summary


def run_quickly(
    out: Path,
    jobs: Sequence[SlideJob],
    sharing: Sharing,
    run: Callable[[SlideJob], None] = lambda job: None,
    cache: CacheSettings | None = None,
) -> list[SlideOutcome]:
    """Run slides whose output is their name."""

    def finished(job: SlideJob, claim: Claim | None) -> Path | None:
        if claim is not None:
            clear_leftovers(out, job.slide_id, claim.ended)
        return out / job.slide_id if (out / job.slide_id).exists() else None

    def write(job: SlideJob, claim: Claim, _: OnTiles | None) -> Path:
        with slide_folder(out, job.slide_id, claim) as folder:
            (folder / "prediction.json").write_text(f"{job.slide_id} ")
            run(job)
            with (folder / "prediction.json").open("a") as file:
                file.write("whole")
        return out / job.slide_id

    def outcome_of(slide_id: str, status: Status, reason: str, seconds: float, folder: Path | None) -> SlideOutcome:
        return SlideOutcome(slide_id, status, reason, seconds)

    def sweep_out() -> None:
        sweep(out)

    return run_each(
        jobs, out, outcome_of, finished, write, sharing=sharing, cache=cache, request="quick", sweep=sweep_out
    )


def start(out: Path, count: int, hold: Path, timeout_s: float = 300, drive: Path | None = None) -> Popen[str]:
    """Start a process of a fleet."""
    arguments = [out, count, hold, timeout_s, *filter(None, [drive])]
    command = [sys.executable, __file__, *map(str, arguments)]
    return Popen(command, stdout=PIPE, stderr=PIPE, text=True)


def numbered(count: int) -> list[SlideJob]:
    return [SlideJob(f"s{number:03d}", Path("none.svs")) for number in range(count)]


def whole_outputs(out: Path) -> set[str]:
    """The published slides, each of which must be whole; there must be nothing else."""
    rows = read_summary(out / "summary.csv")
    published = {path.name: (path / "prediction.json").read_text() for path in out.iterdir() if path.is_dir()}
    assert published == {name: f"{name} whole" for name in published}
    assert set(rows) == set(published)
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    return set(published)


def main(out: Path, count: int, hold: Path, timeout_s: float = 300, drive: Path | None = None) -> None:
    """Run slides as one of several processes."""

    def run(job: SlideJob) -> None:
        if drive is not None and job.slide_id == "s003":
            drive.read_bytes()
        while hold.exists():
            time.sleep(0.01)

    try:
        outcomes = run_quickly(out, numbered(count), Sharing(claim_timeout_s=timeout_s), run)
    except OutputError as error:
        sys.exit(str(error))
    print(*sorted(one.slide_id for one in outcomes if one.status == "ok" and not one.elsewhere))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *map(float, sys.argv[4:5]), *map(Path, sys.argv[5:]))
