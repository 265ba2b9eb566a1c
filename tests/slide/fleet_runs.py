"""Slides that take milliseconds, run as the pipeline runs real ones; run as a script, this is one process of a fleet.

python tests/slide/fleet_runs.py OUT SLIDES
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from maskattn.slide.each_slide import OnTiles, run_each
from maskattn.slide.fleet.claims import Claim
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.manifest import SlideJob
from maskattn.slide.outcome import Status
from maskattn.slide.output_folder import clear_leftovers, slide_folder, sweep
from maskattn.slide.prediction import SlideOutcome
from maskattn.slide.remote import CacheSettings


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


def main(out: Path, count: int, hold: Path) -> None:
    """Run slides as one of several processes."""

    def run(_: SlideJob) -> None:
        while hold.exists():
            time.sleep(0.01)

    run_quickly(out, [SlideJob(f"s{number:03d}", Path("none.svs")) for number in range(count)], Sharing(), run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
