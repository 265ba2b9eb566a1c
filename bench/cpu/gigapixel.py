"""Time per stage, memory and tokens of `maskattn infer` on a composed gigapixel slide, masked and with --no-mask.

The slide repeats a real region, CMU-1-Small-Region.svs of OpenSlide's test data (CC0), to about 40,000 × 40,000 px;
about a third of it is tissue, as of the region. Its file name marks it as composed. It is written tile by tile and
level by level, so that composing needs no more memory than the region itself.

    python -m bench.cpu.gigapixel path/to/CMU-1-Small-Region.svs [--side 40000] [--keep DIR] [--tokens]

needs psutil, tifffile and imagecodecs (JPEG). Writes bench/results/gigapixel.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import psutil
import tifffile
import torch

TILE_PX = 256
DOWNSAMPLES = (1, 4, 16)
RESULTS = Path(__file__).parents[1] / "results"
STAGES = ("open", "tissue", "grid", "read", "encode", "slide", "tokens", "write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("region", type=Path, help="CMU-1-Small-Region.svs")
    parser.add_argument("--side", type=int, default=40_000, help="approximate width and height in pixels")
    parser.add_argument("--keep", type=Path, help="folder for the slide and the outputs; by default they are removed")
    parser.add_argument("--tokens", action="store_true", help="with token maps")
    parser.add_argument("--workers", type=int, help="maskattn's default if not given")
    parser.add_argument("--impl", help="implementation of the attention; maskattn's default if not given")
    parser.add_argument("--model", type=Path, help="the bundled demonstration if not given")
    parser.add_argument("--name", default="gigapixel", help="stem of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        slide = composed(arguments.region, folder, arguments.side)
        options = [] if arguments.workers is None else ["--workers", str(arguments.workers)]
        options += ["--tokens"] if arguments.tokens else []
        options += ["--impl", arguments.impl] if arguments.impl else []
        options += ["--model", str(arguments.model)] if arguments.model else []
        runs = {
            "masked": infer(slide, folder / "masked", options),
            "unmasked": infer(slide, folder / "unmasked", [*options, "--no-mask"]),
        }
    report(arguments, runs)


def composed(region: Path, folder: Path, side_px: int) -> Path:
    """Return the slide that :func:`compose` writes, reused if the folder has it already."""
    folder.mkdir(parents=True, exist_ok=True)
    slide = folder / f"composed_{side_px}.tiff"
    if not slide.exists():
        start = time.perf_counter()
        compose(region, slide, side_px)
        print(f"{slide.name}: {slide.stat().st_size / 1e6:.0f} MB composed in {time.perf_counter() - start:.0f} s")
    return slide


def compose(region: Path, path: Path, side_px: int) -> None:
    """Repeat the region to about ``side_px`` × ``side_px`` as a tiled pyramidal JPEG TIFF, written tile by tile."""
    with openslide.OpenSlide(region) as source:
        spacing_um = float(source.properties[openslide.PROPERTY_NAME_MPP_X])
        whole = np.asarray(source.read_region((0, 0), 0, source.dimensions))[..., :3]
    height, width = (side // max(DOWNSAMPLES) * max(DOWNSAMPLES) for side in whole.shape[:2])
    unit = np.ascontiguousarray(whole[:height, :width])
    rows, columns = max(1, round(side_px / height)), max(1, round(side_px / width))
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for downsample in DOWNSAMPLES:
            size = (width // downsample, height // downsample)
            level = unit if downsample == 1 else cv2.resize(unit, size, interpolation=cv2.INTER_AREA)
            shape = (rows * size[1], columns * size[0], 3)
            writer.write(
                tiles_of(level, shape),
                shape=shape,
                dtype=np.uint8,
                photometric="rgb",
                tile=(TILE_PX, TILE_PX),
                compression="jpeg",
                compressionargs={"level": 85},
                resolution=(1e4 / (spacing_um * downsample),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=int(downsample > 1),
                description=f"composed: {region.name} repeated {rows} x {columns} times",
                metadata=None,
            )


def tiles_of(level: np.ndarray, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Yield the tiles of a level that repeats ``level`` up to ``shape``, row by row."""
    height, width = level.shape[:2]
    for top in range(0, shape[0], TILE_PX):
        for left in range(0, shape[1], TILE_PX):
            rows = np.arange(top, top + TILE_PX) % height
            columns = np.arange(left, left + TILE_PX) % width
            yield level[np.ix_(rows, columns)]


def infer(slide: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """Run the command line in a separate process; return its prediction, wall time and peak memory of all processes."""
    command = [sys.executable, "-m", "maskattn", "infer", str(slide), "--out", str(out), "--overwrite", *options]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peaks = (0, 0)
    while process.poll() is None:
        peaks = max(peaks[0], proportional_bytes(process.pid)), max(peaks[1], resident_bytes(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    prediction = json.loads((out / slide.stem / "prediction.json").read_text())
    prediction["slide"]["path"] = slide.name  # its path on this machine does not belong in the result
    return {"wall_s": seconds, "peak_bytes": peaks[0], "peak_resident_bytes": peaks[1], "prediction": prediction}


def proportional_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children, pages that they share counted once."""
    return _memory_of_family(pid, "pss")


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children; shared pages count for each process."""
    return _memory_of_family(pid, "rss")


def _memory_of_family(pid: int, kind: str) -> int:
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(getattr(each.memory_full_info() if kind == "pss" else each.memory_info(), kind) for each in family)
    except psutil.NoSuchProcess:
        return 0


def report(arguments: argparse.Namespace, runs: dict[str, dict[str, Any]]) -> None:
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": machine, "side_px": arguments.side, "tokens": arguments.tokens, "runs": runs}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    text = table(machine, runs)
    (RESULTS / f"{arguments.name}.md").write_text(text)
    print(text)


def table(machine: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    masked, unmasked = (runs[name]["prediction"] for name in ("masked", "unmasked"))
    slide, counts = masked["slide"], masked["counts"]
    tokens = counts["kept_tokens"] + counts["skipped_tokens"]
    lines = [
        "# A composed gigapixel slide, masked and not",
        "",
        f"{slide['width_px']:,} × {slide['height_px']:,} px at {slide['spacing_um']:g} µm, made by repeating "
        f"CMU-1-Small-Region.svs; model {masked['model']['name']} ({masked['model']['sha256']}), tiles of "
        f"{masked['settings']['tile_px']} px at {masked['settings']['spacing_um']:g} µm, device "
        f"{masked['settings']['device']}; {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"{machine['capability']}, {machine['threads']} torch threads, torch {machine['torch']}, {machine['date']}. "
        "`python -m bench.cpu.gigapixel CMU-1-Small-Region.svs`",
        "",
        f"Kept {counts['kept_tokens']:,} of {tokens:,} tokens (f = {counts['kept_tokens'] / tokens:.3f}) in "
        f"{counts['kept_tiles']:,} of {counts['cells']:,} tiles; skipped {counts['skipped_tokens']:,} tokens.",
        "",
        "| stage | masked, s | unmasked, s | unmasked / masked |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        times = [prediction["timings_s"].get(stage) for prediction in (masked, unmasked)]
        if any(times):
            lines.append(row(stage, *(seconds or 0.0 for seconds in times)))
    lines.append(row("all stages", *(sum(prediction["timings_s"].values()) for prediction in (masked, unmasked))))
    lines.append(row("wall, with start-up", runs["masked"]["wall_s"], runs["unmasked"]["wall_s"]))
    for name, key in (("", "peak_bytes"), (", shared pages for each process", "peak_resident_bytes")):
        memory = [runs[run][key] / 2**20 for run in ("masked", "unmasked")]
        lines.append(f"| peak memory, MiB{name} | {memory[0]:,.0f} | {memory[1]:,.0f} | {memory[1] / memory[0]:.2f} |")
    return "\n".join(lines) + "\n"


def row(name: str, masked_s: float, unmasked_s: float) -> str:
    ratio = f"{unmasked_s / masked_s:.2f}" if masked_s >= 0.005 else ""
    return f"| {name} | {masked_s:,.2f} | {unmasked_s:,.2f} | {ratio} |"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
