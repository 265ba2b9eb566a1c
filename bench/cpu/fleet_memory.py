"""Memory of one process over many slides: ``python -m bench.cpu.fleet_memory --slides 2000``, about ten minutes.

    python -m bench.cpu.fleet_memory --slides 2000 -- --tokens     with other options of `maskattn infer`

Slides of a few tiles are drawn, each listed under many names, and run by one `maskattn infer` with the demonstration's
model. Whenever another eighth of them has ended, the table gets a row: the resident memory of the process and of its
decoding processes, its threads and its open files. A leak of a slide's worth would show as a slope.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile

DRAWN = 20
SPACING_UM = 0.5


@dataclass(frozen=True)
class Sample:
    """A look at a process: resident memory of itself and its children in MiB, threads, and open files."""

    slides: int
    own_mib: float
    children_mib: float
    threads: int
    files: int


def draw(path: Path, seed: int) -> Path:
    """Write a slide of 512 px with a stained blob."""
    rng = np.random.default_rng(seed)
    tissue = np.zeros((512, 512), np.uint8)
    cv2.ellipse(tissue, (256, 256), (150, 100), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    rgb = np.where(tissue[..., None] > 0, np.array((205, 120, 170)), np.array((243, 242, 244)))
    rgb = np.clip(rgb + rng.integers(-25, 26, (512, 512, 1)) * tissue[..., None], 0, 255).astype(np.uint8)
    resolution = (1e4 / SPACING_UM,) * 2
    options = {"resolution": resolution, "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(path, rgb, photometric="rgb", tile=(256, 256), compression="zlib", **options)
    return path


def look(pid: int, slides: int) -> Sample:
    """Look at a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Sample(
        slides,
        _resident_mib(pid),
        sum(_resident_mib(int(child)) for child in children),
        len(os.listdir(f"/proc/{pid}/task")),
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(folder: Path, slides: int, samples: int, options: list[str]) -> list[Sample]:
    """Run the slides and look at the process at equal distances."""
    drawn = [draw(folder / f"{seed}.tiff", seed) for seed in range(DRAWN)]
    rows = [f"s{number:05d},{drawn[number % DRAWN]}" for number in range(slides)]
    (folder / "slides.csv").write_text("\n".join(["slide_id,slide_path", *rows, ""]))
    out = folder / "out"
    command = [sys.executable, "-m", "maskattn", "infer", str(folder / "slides.csv"), "--out", str(out), *options]
    found: list[Sample] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(found) < samples:
            ended = _rows(out / "summary.csv")
            if ended >= (slides - DRAWN) * (len(found) + 1) // samples:
                found.append(look(process.pid, ended))
                print(row(found[-1]), flush=True)
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"all slides must be run, got exit code {process.returncode}")
    return found


def _rows(table: Path) -> int:
    return table.read_bytes().count(b"\n") - 1 if table.exists() else 0


def row(sample: Sample) -> str:
    """Return a row of the table in Markdown."""
    return (
        f"| {sample.slides:,} | {sample.own_mib:.1f} | {sample.children_mib:.1f} | {sample.threads} | {sample.files} |"
    )


def main() -> None:
    """Parse the arguments, run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("options", nargs="*", help="options of `maskattn infer`, after --")
    given = parser.parse_args()
    print("| slides | process, MiB | its decoding processes, MiB | threads | open files |\n|---:|---:|---:|---:|---:|")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), given.slides, given.samples, given.options)
    print(f"\n{given.slides:,} slides in {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
