"""One process, two, and Ray over the same slides: ``python -m bench.cpu.fleet --slide SLIDE``, about eight minutes.

    python -m bench.cpu.fleet --slide SLIDE --counts 2 8 40 --rounds 3 3 1     what bench/results/fleet.md shows
    python -m bench.cpu.fleet --claims                                         file operations of claims, by strace

Each count of slides is run by ``maskattn infer`` alone, with ``--devices cpu:2`` and with ``--engine ray --devices
cpu:2``, in alternation; the slide is listed under as many names. Times are of whole commands, start-up included:
medians of the rounds. The rate without start-up is that between the smallest and the largest count.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAYS = {
    "one process": [],
    "`--devices cpu:2`": ["--devices", "cpu:2"],
    "`--engine ray --devices cpu:2`": ["--engine", "ray", "--devices", "cpu:2"],
}


@dataclass(frozen=True)
class Cost:
    """Wall and processor seconds of a command with all its processes."""

    wall_s: float
    processor_s: float


def run(folder: Path, slide: Path, count: int, options: list[str]) -> Cost:
    """Run one slide under many names."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    rows = [f"s{number:03d},{slide}" for number in range(count)]
    (folder / "slides.csv").write_text("\n".join(["slide_id,slide_path", *rows, ""]))
    command = [sys.executable, "-m", "maskattn", "infer", str(folder / "slides.csv"), "--out", str(folder / "out")]
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    began = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, *options], env=threads, **quiet) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"all slides must be run, got exit code {process.returncode} with {options}")
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime)


def measure(slide: Path, counts: list[int], rounds: list[int]) -> None:
    """Print the table."""
    print("| slides | started as | wall time, s | processor time, s | slides per hour | ratio to one process |")
    print("|---:|---|---:|---:|---:|---:|")
    walls: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), slide, 1, [])  # fills the caches
        for count, repeated in zip(counts, rounds, strict=True):
            costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
            for _ in range(repeated):
                for way, options in WAYS.items():
                    costs[way].append(run(Path(folder), slide, count, options))
            for way, found in costs.items():
                wall_s = statistics.median(one.wall_s for one in found)
                # Ray's processes are no children of the command.
                processor = "" if "ray" in way else f"{statistics.median(one.processor_s for one in found):.1f}"
                walls[count, way] = wall_s
                ratio = walls[count, "one process"] / wall_s
                pace = 3600 * count / wall_s
                print(f"| {count} | {way} | {wall_s:.1f} | {processor} | {pace:,.0f} | {ratio:.2f} |", flush=True)
    few, many = min(counts), max(counts)
    for way in WAYS:
        each_s = (walls[many, way] - walls[few, way]) / (many - few) if many > few else float("nan")
        print(f"without start-up, {way}: {each_s:.2f} s a slide, {3600 / each_s:,.0f} slides per hour")


def count_claims(slides: int) -> None:
    """Print the file operations in the fleet's folder for each slide, and the processor time of the fleet's part."""
    script = ROOT / "tests" / "slide" / "fleet_runs.py"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments = [sys.executable, str(script), str(folder / "out"), str(slides), str(folder / "none")]
        log = folder / "strace.log"
        subprocess.run(["strace", "-f", "-e", "trace=%file,getdents64", "-o", str(log), *arguments], check=True)
        calls: Counter[str] = Counter()
        for line in log.read_text(errors="replace").splitlines():
            found = re.match(r"\d+ +(\w+)\(", line)
            if found and "/.fleet" in line:
                calls[found[1]] += 1
    for name, total in calls.most_common():
        print(f"{name}: {total / slides:.2f} a slide")
    print(f"in all: {sum(calls.values()) / slides:.1f} a slide, of {slides} slides")


_PLAIN = """
import sys
from pathlib import Path
from maskattn.slide.output_folder import prepare_output, slide_folder
from maskattn.slide.prediction import SlideOutcome
from maskattn.slide.summary import append_row
out = Path(sys.argv[1])
prepare_output(out)
for number in range(int(sys.argv[2])):
    name = f"s{number:03d}"
    with slide_folder(out, name) as folder:
        (folder / "prediction.json").write_text(f"{name} ")
        with (folder / "prediction.json").open("a") as file:
            file.write("whole")
    append_row(out / "summary.csv", SlideOutcome(name, "ok", "", 0.0).row())
"""


def time_claims(few: int, many: int) -> None:
    """Print the processor time that a slide takes with claims, and without them, where only its outputs are written."""
    script = str(ROOT / "tests" / "slide" / "fleet_runs.py")
    for what, start in (("with claims", [script]), ("without", ["-c", _PLAIN])):
        spent = []
        for slides in (few, many):
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "out")
                command = [sys.executable, *start, out, str(slides), str(Path(folder) / "none")]
                with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                    _, status, usage = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    raise RuntimeError(f"all slides must be run, got exit code {process.returncode} {what}")
                spent.append(usage.ru_utime + usage.ru_stime)
        print(f"{what}: {1000 * (spent[1] - spent[0]) / (many - few):.2f} ms of processor time a slide")


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8, 40])
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 3, 1])
    parser.add_argument("--claims", action="store_true", help="count the file operations of claims instead")
    given = parser.parse_args()
    if given.claims:
        count_claims(200)
        time_claims(50, 1050)
    else:
        measure(given.slide.resolve(), given.counts, given.rounds)


if __name__ == "__main__":
    main()
