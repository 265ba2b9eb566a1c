"""Processes that share slides while one of them is killed every few seconds; counts what came of it.

    python tests/slide/fuzz_fleet.py SLIDES PROCESSES MINUTES [SEED]

The slide is drawn, under many names, and the model small. All outputs must equal those of an undisturbed run of one
process, byte for byte but for the times of its stages. When the slides are done before the time is up, the outputs are
compared and removed, and a new round begins.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]

import torch  # noqa: E402
from small_slides import small_model, write_slide  # noqa: E402

from maskattn.nn.slide_model import SlideModel  # noqa: E402
from maskattn.slide.manifest import SlideJob  # noqa: E402
from maskattn.slide.request import RunSettings  # noqa: E402
from maskattn.slide.run import run_slides  # noqa: E402
from maskattn.slide.summary import read_summary  # noqa: E402


def work(model: SlideModel, jobs: list[SlideJob], out: Path) -> None:
    """What each process runs; it is forked, so that a new one begins at once."""
    torch.set_num_threads(1)
    run_slides(jobs, model, RunSettings(out, batch_size=8))


def outputs(folder: Path) -> dict[str, bytes]:
    """A slide's outputs, without the times of its stages."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "prediction.json":
            data = json.dumps({**json.loads(data), "timings_s": None}).encode()
        found[path.name] = data
    return found


def round_of(
    model: SlideModel, jobs: list[SlideJob], out: Path, processes: int, until: float, chance: random.Random
) -> int:
    """Run all slides with processes that are killed; returns how many were."""
    fork, killed = multiprocessing.get_context("fork"), 0

    def start() -> Any:
        process = fork.Process(target=work, args=(model, jobs, out))
        process.start()
        return process

    running = [start() for _ in range(processes)]
    next_kill = time.monotonic() + chance.uniform(0.5, 4)
    while any(process.is_alive() for process in running):
        time.sleep(0.05)
        if time.monotonic() > next_kill and time.monotonic() < until:
            number = chance.randrange(processes)
            if running[number].is_alive():
                os.kill(running[number].pid, signal.SIGKILL)
                running[number].join()
                running[number], killed = start(), killed + 1
            next_kill = time.monotonic() + chance.uniform(0.5, 4)
    codes = [process.exitcode for process in running]
    if codes != [0] * processes:
        raise AssertionError(f"every process that was not killed must end well, got exit codes {codes}")
    return killed


def main(count: int, processes: int, minutes: float, seed: int = 0) -> None:
    """Rounds until the time is up, then the counts."""
    torch.set_num_threads(1)
    chance, model = random.Random(seed), small_model()
    killed = rounds = compared = 0
    with tempfile.TemporaryDirectory() as scratch:
        slide = write_slide(Path(scratch) / "disc.tiff")
        jobs = [SlideJob(f"s{number:04d}", slide) for number in range(count)]
        work(model, jobs, Path(scratch) / "alone")
        expected = {job.slide_id: outputs(Path(scratch) / "alone" / job.slide_id) for job in jobs}
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            out = Path(scratch) / "out"
            killed += round_of(model, jobs, out, processes, until, chance)
            rows = read_summary(out / "summary.csv")
            if sorted(rows) != [job.slide_id for job in jobs]:
                raise AssertionError(f"the summary must have each slide once, got {len(rows)} of {count}")
            strange = {path.name for path in out.iterdir()} - {*rows, "summary.csv"}
            failed = [row for row in rows.values() if row["status"] not in ("ok", "skipped")]
            if strange or failed:
                raise AssertionError(f"nothing may fail or be left over, got {strange} and {failed}")
            for job in jobs:
                found, alone = outputs(out / job.slide_id), expected[job.slide_id]
                different = [name for name in {*found, *alone} if found.get(name) != alone.get(name)]
                if different:
                    raise AssertionError(f"outputs must equal an undisturbed run's, got {different} of {job.slide_id}")
            compared, rounds = compared + len(jobs), rounds + 1
            shutil.rmtree(out)
    print(f"{rounds} rounds of {count} slides by {processes} processes, {killed} of which were killed: ", end="")
    print(f"{compared:,} slides published once each and equal to an undisturbed run's, no leftover")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
