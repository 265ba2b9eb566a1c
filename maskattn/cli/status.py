"""``maskattn status``: prints the progress of a run, even while it is running."""

from __future__ import annotations

from typing import Annotated

import typer

from maskattn.cli.options import Debug, Outputs
from maskattn.cli.reporting import errors_in_one_line, say, say_json

__all__ = ["status"]


def status(
    out: Outputs,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that is known as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print the progress of a run, even while it is running.

    Lists what is done, what is running where and since when, what failed and why, what is left, and the pace.
    """
    from dataclasses import asdict

    from maskattn.slide.fleet.status import RunStatus, run_status

    with errors_in_one_line(debug):
        run: RunStatus = run_status(out)
    if as_json:
        say_json({**asdict(run), "left": run.left, "slides_per_hour": run.slides_per_hour})
        return
    ended = f"{run.ok:,} ok, {run.skipped:,} skipped, {len(run.failed):,} failed"
    say(f"done     {run.done:,} of {run.total:,} slides: {ended}")
    for slide_id, reason in run.failed:
        say(f"failed   {slide_id}: {reason}")
    for one in run.processes:
        if one.ended:
            say(f"ended    {one.name}, which did not leave" + (f"; held {one.slide_id}" if one.slide_id else ""))
        elif one.slide_id is not None:
            say(f"running  {one.slide_id}: {one.name}, since {one.claimed_at}")
        else:
            say(f"at work  {one.name}, between two slides or waiting for the last")
    at_work = sum(not one.ended for one in run.processes)
    if at_work:
        pace = f"{run.slides_per_hour:,.0f} slides per hour" if run.slides_per_hour else "no slide ended yet"
        to_go = "" if run.seconds_left is None else f", about {_duration(run.seconds_left)} to go"
        processes = "one process is" if at_work == 1 else f"{at_work:,} processes are"
        say(f"left     {run.left:,} slides; {processes} at work, {pace}{to_go}")
    else:
        say(
            f"left     {run.left:,} slides; no process is at work"
            + (", run the same command again" if run.left else "")
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
