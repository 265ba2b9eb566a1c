"""Processes that share slides while one of them is killed every few seconds; counts what came of it.

    python tests/slide/fuzz_fleet.py SLIDES PROCESSES MINUTES [SECONDS_PER_SLIDE] [SEED]

The slide is drawn, under many names, and the model small. All outputs must equal those of an undisturbed run of one
process, byte for byte but for the times of its stages. A published folder must never be replaced, and neither a claim
nor a process may be left over. When the slides are done before the time is up, the outputs are compared and removed,
and a new round begins. ``SECONDS_PER_SLIDE`` are slept among a slide's tiles, so that one round lasts long. The first
process decodes in a worker process; the others decode in a thread.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A tool, not a test: the path comes first, hence the late imports.
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]

import torch  # noqa: E402
from small_slides import small_model, write_slide  # noqa: E402

from maskattn.nn.slide_model import SlideModel  # noqa: E402
from maskattn.slide.fleet.claims import owner_of  # noqa: E402
from maskattn.slide.fleet.members import read_member  # noqa: E402
from maskattn.slide.manifest import SlideJob  # noqa: E402
from maskattn.slide.prediction import SlideOutcome  # noqa: E402
from maskattn.slide.request import RunSettings  # noqa: E402
from maskattn.slide.run import run_slides  # noqa: E402
from maskattn.slide.summary import read_summary  # noqa: E402

_BECOME_REAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans become children of this process, where they are found
_BATCHES = 6  # of a slide, with its token maps


class Slowly:
    """Progress that sleeps among a slide's tiles, and logs each slide that its process published."""

    def __init__(self, seconds_per_slide: float, log: Path) -> None:
        self._seconds, self._log, self._chance = seconds_per_slide, log, random.Random()
        self._pause_s = 0.0

    def slide_started(self, job: SlideJob) -> None:
        self._pause_s = self._chance.uniform(0, 2 * self._seconds) / _BATCHES

    def tiles_done(self, done: int, total: int) -> None:
        time.sleep(self._pause_s)

    def slide_ended(self, outcome: SlideOutcome) -> None:
        if outcome.status == "ok":
            with self._log.open("a") as file:
                file.write(f"{outcome.slide_id}\n")


@dataclass
class Task:
    """What each process runs; it is forked, so that a new one begins at once."""

    model: SlideModel
    jobs: list[SlideJob]
    out: Path
    log: Path
    seconds_per_slide: float = 0.0

    def work(self, number: int = 1) -> None:
        torch.set_num_threads(1)
        settings = RunSettings(self.out, batch_size=8, workers=int(number == 0))
        run_slides(self.jobs, self.model, settings, Slowly(self.seconds_per_slide, self.log))

    def start(self, number: int = 1) -> Any:
        process = multiprocessing.get_context("fork").Process(target=self.work, args=(number,))
        process.start()
        return process


@dataclass
class Counts:
    """What the rounds have come to."""

    rounds: int = 0
    killed: int = 0
    killed_at_a_slide: int = 0
    compared: int = 0
    abandoned: int = 0
    seconds: float = 0.0
    published: dict[str, int] = field(default_factory=dict)


def outputs(folder: Path) -> dict[str, bytes]:
    """A slide's outputs, without the times of its stages and the number of its workers."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "prediction.json":
            told = json.loads(data)
            told["settings"].pop("workers")
            data = json.dumps({**told, "timings_s": None}).encode()
        found[path.name] = data
    return found


def at_slides(out: Path) -> set[int]:
    """The processes that hold a slide."""
    members = [
        read_member(out / ".fleet" / "members", owner_of(path)) for path in (out / ".fleet" / "claims").glob("*")
    ]
    return {about["process"]["pid"] for about in members if about is not None}


def watch_published(out: Path, counts: Counts) -> None:
    """Check that no published folder was replaced by another since the last look."""
    for entry in os.scandir(out):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if counts.published.setdefault(entry.name, entry.inode()) != entry.inode():
            raise AssertionError(f"a slide must be published once, got {entry.name} a second time")


def round_of(task: Task, processes: int, until: float, chance: random.Random, counts: Counts) -> None:
    """Run all slides with processes that are killed."""
    counts.published.clear()
    running = [task.start(number) for number in range(processes)]
    next_kill = time.monotonic() + chance.uniform(1, 6)
    while any(process.is_alive() for process in running):
        time.sleep(0.05)
        if next_kill < time.monotonic() < until:
            number = chance.randrange(processes)
            if running[number].is_alive():
                counts.killed_at_a_slide += running[number].pid in at_slides(task.out)
                os.kill(running[number].pid, signal.SIGKILL)
                running[number].join()
                running[number], counts.killed = task.start(number), counts.killed + 1
            watch_published(task.out, counts)
            next_kill = time.monotonic() + chance.uniform(1, 6)
    codes = [process.exitcode for process in running]
    if codes != [0] * processes:
        raise AssertionError(f"every process that was not killed must end well, got exit codes {codes}")


def check_round(task: Task, expected: dict[str, dict[str, bytes]], counts: Counts) -> None:
    """Check the outputs of a round, and that nothing else is left of it."""
    rows = read_summary(task.out / "summary.csv")
    given = [job.slide_id for job in task.jobs]
    if sorted(rows) != given:
        raise AssertionError(f"the summary must have each slide once, got {len(rows)} of {len(given)}")
    failed = [row for row in rows.values() if row["status"] not in ("ok", "skipped")]
    if failed and all("that were killed while running it" in row["reason"] for row in failed):
        counts.abandoned += len(failed)  # after five of its processes were killed; the next run tries it again
        task.start().join()
        failed = [row for row in read_summary(task.out / "summary.csv").values() if row["status"] == "failed"]
    watch_published(task.out, counts)
    strange = {path.name for path in task.out.iterdir()} - {*given, "summary.csv"}
    if strange or failed:
        raise AssertionError(f"nothing may fail or be left over, got {strange} and {failed}")
    twice = {slide: times for slide, times in Counter(task.log.read_text().split()).items() if times > 1}
    if twice:
        raise AssertionError(f"a slide must be published once, got {twice}")
    for slide_id in given:
        found, alone = outputs(task.out / slide_id), expected[slide_id]
        different = [name for name in {*found, *alone} if found.get(name) != alone.get(name)]
        if different:
            raise AssertionError(f"outputs must equal an undisturbed run's, got {different} of {slide_id}")
    orphans = left_processes(10.0)
    if orphans:
        raise AssertionError(f"no process may be left over, got {orphans}")
    counts.compared, counts.rounds = counts.compared + len(given), counts.rounds + 1


def left_processes(patience_s: float) -> list[str]:
    """The processes that this one started or that were orphaned to it, and that have not ended in so many seconds."""
    until = time.monotonic() + patience_s
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        if time.monotonic() > until:
            pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids]
        time.sleep(0.1)


def main(count: int, processes: int, minutes: float, seconds_per_slide: float = 0.0, seed: int = 0) -> None:
    """Rounds until the time is up, then the counts."""
    ctypes.CDLL(None, use_errno=True).prctl(_BECOME_REAPER, 1, 0, 0, 0)
    torch.set_num_threads(1)
    chance, counts = random.Random(seed), Counts()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        slide = write_slide(folder / "disc.tiff")
        jobs = [SlideJob(f"s{number:04d}", slide) for number in range(count)]
        Task(small_model(), jobs, folder / "alone", folder / "alone.log").start().join()
        expected = {job.slide_id: outputs(folder / "alone" / job.slide_id) for job in jobs}
        task = Task(small_model(), jobs, folder / "out", folder / "published.log", seconds_per_slide)
        began = time.monotonic()
        while time.monotonic() < began + 60 * minutes:
            task.out.mkdir()
            round_of(task, processes, began + 60 * minutes, chance, counts)
            counts.seconds = time.monotonic() - began
            check_round(task, expected, counts)
            shutil.rmtree(task.out)
            task.log.unlink()
    print(
        f"{counts.rounds} rounds of {count} slides by {processes} processes in {counts.seconds / 60:.1f} minutes: "
        f"{counts.killed} processes killed, {counts.killed_at_a_slide} of them at a slide; {counts.compared:,} slides "
        f"published once each and equal to an undisturbed run's ({counts.abandoned} of them by the next run, after "
        "five of their processes were killed); no claim, process or other file left over"
    )


if __name__ == "__main__":
    numbers = sys.argv[1:]
    main(int(numbers[0]), int(numbers[1]), float(numbers[2]), *map(float, numbers[3:4]), *map(int, numbers[4:]))
