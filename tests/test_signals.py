"""Runs that are told to end: nothing half is left behind, no process stays, and one line says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_groups import group_is_gone
from small_slides import small_model, tissue_image, write_slide

SLOW = """
import sys, time
from maskattn.cli import main
from maskattn.cli.progress import ProgressBars
def slowly(self, done, total):
    print("a batch", flush=True)
    time.sleep({pause})
ProgressBars.tiles_done = slowly
main()
"""


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them, and what they start, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[str]]:
    slide = write_slide(tmp_path / "disc.tiff", tissue_image())
    small_model().save(tmp_path / "model.safetensors")
    arguments = ["infer", str(slide), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model.safetensors")]
    return tmp_path / "out", [*arguments, "--batch-size", "2"]


def started(arguments: list[str], pause: float) -> subprocess.Popen[str]:
    """A run in a process group of its own, in the middle of its slide."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(pause=pause), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "a batch\n", process.communicate()[1]
    return process


@pytest.mark.parametrize(
    ("number", "code", "words", "whole_group", "workers"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM", False, 2),  # as docker stop sends it
        (signal.SIGTERM, 143, "ended by SIGTERM", True, 2),  # as SLURM does
        (signal.SIGINT, 130, "interrupted", True, 2),  # as a terminal does
        (signal.SIGINT, 130, "interrupted", False, 0),
        (signal.SIGHUP, 129, "ended by SIGHUP", False, 0),
    ],
)
def test_a_run_that_is_told_to_end_leaves_nothing_behind(
    run: tuple[Path, list[str]], number: int, code: int, words: str, whole_group: bool, workers: int
) -> None:
    out, arguments = run
    process = started([*arguments, "--workers", str(workers)], pause=0.2)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    lines = [line for line in errors.splitlines() if "Random weights" not in line]
    assert lines == [f"maskattn: {words}; finished slides are kept; run the same command again to resume"]
    assert list(out.iterdir()) == []
    assert group_is_gone(process.pid, within_s=60)


HANGING = """
import ctypes
from maskattn.cli import reporting, signals
signals._UNWOUND_AFTER_S = 1.0
with reporting.errors_in_one_line(debug=False):
    print("about to hang", flush=True)
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # for ever, and no signal ends it
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_hangs_in_a_library_is_ended_all_the_same(number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "about to hang\n"
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == "maskattn: the command did not end within 1 s and was terminated\n"
