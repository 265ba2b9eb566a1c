"""``maskattn status`` on a run's folder: during the run, after it, and after its processes were killed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_runs import run_quickly
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.errors import OutputError, SlideError
from maskattn.slide.fleet.claims import Claims
from maskattn.slide.fleet.members import Member, Watch
from maskattn.slide.fleet.process import Process
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.fleet.status import RunStatus, run_status
from maskattn.slide.manifest import SlideJob

JOBS = [SlideJob(name, Path("none.svs")) for name in ("a", "b", "broken", "c", "d")]


def test_run_reports_its_progress_while_it_runs(tmp_path: Path) -> None:
    seen: list[RunStatus] = []

    def run(job: SlideJob) -> None:
        if job.slide_id == "broken":
            raise SlideError("it is broken")
        if job.slide_id == "c":
            seen.append(run_status(tmp_path))

    run_quickly(tmp_path, JOBS, Sharing(), run)
    (status,) = seen
    assert (status.total, status.done, status.left, status.ok, status.skipped) == (5, 3, 2, 2, 0)
    assert status.failed == (("broken", "it is broken"),)
    (process,) = status.processes
    assert (process.name, process.slide_id, process.slides_done) == (str(Process.current()), "c", 3)
    assert not process.ended
    assert process.slides_per_hour == status.slides_per_hour > 0
    assert status.seconds_left == pytest.approx(2 * 3600 / status.slides_per_hour)
    after = run_status(tmp_path)
    assert (after.total, after.ok, len(after.failed), after.left, after.processes) == (5, 4, 1, 0, ())
    assert after.seconds_left is None


def test_process_that_was_killed_is_named_with_the_slide_it_held(tmp_path: Path) -> None:
    root = tmp_path / ".fleet"
    dead = Member(root / "members", 300.0, {})
    dead.process = replace(Process.current(), started="0")
    dead.tell()
    Claims(root / "claims", dead.token, Watch(root / "members", 300.0)).try_claim("a.b")
    status = run_status(tmp_path)
    assert [(one.ended, one.slide_id) for one in status.processes] == [(True, "a.b")]
    told = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert told.exit_code == 0
    assert "which did not leave; held a.b" in told.stdout
    assert "left     1 slides; no process is at work, run the same command again" in told.stdout


def test_command_reports_it_in_lines_and_as_json(tmp_path: Path) -> None:
    lines: list[str] = []

    def run(job: SlideJob) -> None:
        if job.slide_id == "c":
            lines.extend(CliRunner().invoke(app, ["status", str(tmp_path)]).stdout.splitlines())

    run_quickly(tmp_path, JOBS, Sharing(), run)
    assert lines[0] == "done     3 of 5 slides: 3 ok, 0 skipped, 0 failed"
    assert lines[1].startswith(f"running  c: {Process.current()}, since 20")
    assert lines[2].startswith("left     2 slides; one process is at work, ")
    found = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).stdout)
    assert (found["total"], found["ok"], found["left"], found["processes"]) == (5, 5, 0, [])


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"which contains no run; give the --out"):
        run_status(tmp_path)
    told = CliRunner().invoke(app, ["status", str(tmp_path / "none")])
    assert told.exit_code == 2
