"""Several processes share slides while the drive, the clock or one of them fails: nothing is lost or done twice."""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from fleet_runs import numbered, run_quickly, start, whole_outputs
from test_fleet import at_work

import maskattn.slide.fleet
from maskattn.slide.fleet.claims import owner_of
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.manifest import SlideJob

COUNT = 40


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, for as many pages as some of the slides need."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    """Change a mounted disk; while a file is just being written, it does not turn read-only."""
    wait_for(
        lambda: subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], capture_output=True).returncode == 0
    )


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(processes: list[Popen[str]]) -> list[tuple[int, str, str]]:
    """The exit code and the output of each process, all of which end by themselves."""
    told = [(*one.communicate(timeout=120), one.returncode) for one in processes]
    return [(code, output, errors) for output, errors, code in told]


def run_slides_of(outputs: list[tuple[int, str, str]]) -> list[str]:
    """The slides that the processes ran."""
    return sorted(slide for _, output, _ in outputs for slide in output.split())


def test_full_disk_ends_all_processes_and_the_next_run_completes_their_slides(tmp_path: Path, disk: Path) -> None:
    hold, out = tmp_path / "hold", disk / "out"
    hold.touch()
    processes = [start(out, COUNT, hold) for _ in range(3)]
    wait_for(lambda: len(at_work(out)) == 3)
    remount(disk, "size=144k")  # a page for each file
    hold.unlink()
    assert all(code == 1 and "free space" in errors for code, _, errors in ended(processes))
    remount(disk, "size=4m")
    assert 0 < len([path for path in out.iterdir() if path.is_dir() and not path.name.startswith(".")]) < COUNT
    run_quickly(out, numbered(COUNT), Sharing())
    assert len(whole_outputs(out)) == COUNT


def test_folder_that_turns_read_only_ends_all_processes_and_the_next_run_completes_their_slides(
    tmp_path: Path, disk: Path
) -> None:
    hold, out = tmp_path / "hold", disk / "out"
    hold.touch()
    processes = [start(out, COUNT, hold) for _ in range(3)]
    wait_for(lambda: len(at_work(out)) == 3)
    remount(disk, "ro")
    hold.unlink()
    assert all(code == 1 and "Read-only file system" in errors for code, _, errors in ended(processes))
    remount(disk, "rw")
    run_quickly(out, numbered(COUNT), Sharing())
    assert len(whole_outputs(out)) == COUNT


def test_process_whose_slide_stalls_keeps_it_while_the_others_run_the_rest(tmp_path: Path) -> None:
    out, drive = tmp_path / "out", tmp_path / "drive"
    os.mkfifo(drive)
    processes = [start(out, COUNT, tmp_path / "none", 1.0, drive) for _ in range(3)]
    wait_for(lambda: len([path for path in out.glob("s*") if path.is_dir()]) == COUNT - 1)
    time.sleep(2.0)  # longer than the claim timeout: the process lives, and says so
    claims = list((out / ".fleet" / "claims").iterdir())
    assert [claim.name for claim in claims] == ["s003.1"]
    assert not (out / "s003").exists()
    drive.write_bytes(b"the drive is back")
    told = ended(processes)
    assert [code for code, *_ in told] == [0, 0, 0]
    assert run_slides_of(told) == sorted(job.slide_id for job in numbered(COUNT))
    assert len(whole_outputs(out)) == COUNT


def test_slide_of_a_suspended_process_is_taken_over_and_the_process_discards_its_work(tmp_path: Path) -> None:
    out, hold = tmp_path / "out", tmp_path / "hold"
    hold.touch()
    processes = [start(out, COUNT, hold, 1.0) for _ in range(3)]
    wait_for(lambda: len(at_work(out)) == 3)
    suspended = processes.pop()
    suspended.send_signal(signal.SIGSTOP)
    hold.unlink()
    told = ended(processes)
    assert [code for code, *_ in told] == [0, 0]
    assert run_slides_of(told) == sorted(job.slide_id for job in numbered(COUNT))
    published = {path: path.stat().st_ino for path in out.glob("s0*")}
    suspended.send_signal(signal.SIGCONT)
    assert [(code, output.split()) for code, output, _ in ended([suspended])] == [(0, [])]
    assert {path: path.stat().st_ino for path in out.glob("s0*")} == published
    assert len(whole_outputs(out)) == COUNT


def test_clocks_that_jump_cost_no_process_its_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, touched = random.Random(0), os.utime

    def wild() -> float:
        return chance.uniform(0, 4e9)  # from 1970 to 2096

    def touch(path: Path) -> None:
        touched(path, (wild(), wild()))

    claimed: list[str] = []

    def run(job: SlideJob) -> None:
        (claim,) = (tmp_path / ".fleet" / "claims").iterdir()
        claimed.append(claim.name)
        touched(claim, (wild(), wild()))
        if job.slide_id == "s001":
            other = run_quickly(tmp_path, numbered(3)[:1], Sharing(claim_timeout_s=1))
            assert [one.elsewhere for one in other] == [True]
            time.sleep(1.5)  # beyond the claim timeout
            assert owner_of(claim) != ""
            limited = run_quickly(tmp_path, numbered(3)[1:], Sharing(claim_timeout_s=1, limit=1))
            assert [one.slide_id for one in limited] == ["s002"]

    monkeypatch.setattr(time, "time", wild)
    monkeypatch.setattr(time, "strftime", lambda _: f"{wild()}")
    monkeypatch.setattr(os, "utime", touch)
    outcomes = run_quickly(tmp_path, numbered(3), Sharing(claim_timeout_s=1), run)
    assert [one.status for one in outcomes] == ["ok", "ok", "skipped"]
    assert claimed == ["s000.1", "s001.1"]
    assert len(whole_outputs(tmp_path)) == 3


def test_fleet_reads_no_clock_that_can_be_set() -> None:
    read = set()
    for path in Path(maskattn.slide.fleet.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                read.add(node.attr)
            assert not (isinstance(node, ast.Import | ast.ImportFrom) and "datetime" in ast.unparse(node)), path
    assert read == {"monotonic", "sleep", "strftime"}  # the last for people alone
