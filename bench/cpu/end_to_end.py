"""What a user waits for: whole commands beside a plain loop, and the encoders alone beside other ways to run them.

    python -m bench.cpu.end_to_end REGION.svs [--part encoders|real|composed|small] [--networks ViT-S/16]

``encoders`` times one batch of tiles: timm's network as it is and with torch.compile, OpenVINO and ONNX Runtime (they
take part if installed: ``pip install openvino onnxruntime onnxscript``), and this package's encoder with all tokens and
with 0.3 of them. Each is a process of its own; they take turns, one batch each in a round. The other parts time whole
commands, with start-up: `maskattn infer` with the bundled model or `maskattn extract` with random weights, beside the
loop of ``plain_loop.py`` (in bfloat16 also beside the loop in float32, which is what a tool does that has no other
dtype on a CPU), on the region, a slide composed of it (``gigapixel.py``), and sections of it as many slides.
``--held-to avx2`` holds all to an instruction set below the best, which OpenVINO and ONNX Runtime cannot be. Each call
adds to bench/results/end_to_end.json and writes the page from it, so that parts can be measured one by one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import tifffile
import torch

from bench.cpu.encoder_contenders import (
    ALL_TOKENS,
    CONTENDERS,
    DTYPES,
    MASKED,
    NETWORKS,
    network_of,
    why_not,
)
from bench.cpu.end_to_end_page import FLOAT32_LOOP, LOOP, page
from bench.cpu.gigapixel import composed, cpu_name, resident_bytes
from bench.held_to import TORCH_WITH, held_environment
from bench.pages import commit_id
from bench.timing import median_ratio
from maskattn.slide.versions import installed_versions

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("encoders", "real", "composed", "small")
SECTION_PX = 1024
_MAGNIFICATION = {"real": "20", "small": "20", "composed": "5"}
_PICTURES = 4  # that `maskattn infer` draws: the bundled model's classes and attention
_PROCESSES = 2
_COMMAND = "import bench.torchvision_on_demand, bench.held_to, runpy; runpy.run_module('maskattn', run_name='__main__')"


@dataclass(frozen=True)
class _Command:
    """One of this package's commands: its words, its output folder, and how many processes share its slides."""

    called: list[str]
    out: Path
    processes: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("region", type=Path, help="CMU-1-Small-Region.svs")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="tiles in the encoders' batch")
    parser.add_argument("--slides", type=int, default=200, help="number of small slides")
    parser.add_argument("--side", type=int, default=40_000, help="side of the composed slide")
    parser.add_argument("--held-to", choices=TORCH_WITH, help="the instruction set to hold torch and our kernels to")
    parser.add_argument("--keep", type=Path, help="folder of the slides that are made; by default they are removed")
    parser.add_argument("--out", type=Path, default=RESULTS / "end_to_end.md")
    arguments = parser.parse_args()
    if arguments.held_to:
        os.environ |= held_environment(arguments.held_to)  # of the processes that it starts
    record = arguments.out.with_suffix(".json")
    measured: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for part in arguments.part or PARTS:
            for title in arguments.networks:
                for dtype in arguments.dtypes:
                    if part != "encoders" and title == "bundled" and dtype != "float32":
                        continue  # `maskattn infer` computes in float32
                    if part == "encoders":
                        rows = encoders(title, dtype, arguments)
                    else:
                        rows = commands(part, title, dtype, arguments, folder)
                    measured[f"{part}, {title}, {dtype}"] = {"rows": rows, **_conditions(arguments)}
                    record.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                    arguments.out.write_text(page(measured), encoding="utf-8")
                    print(f"{part}, {title}, {dtype}", json.dumps(rows, indent=1), flush=True)


def encoders(title: str, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one batch of every contender in rounds; return a row for each."""
    refused = {name: why_not(name, dtype) for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        running = {
            name: _Contender(title, dtype, name, arguments, Path(folder) / f"{index}.npy")
            for index, name in enumerate(CONTENDERS)
            if not refused[name]
        }
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for number in range(arguments.rounds):
            for name in list(running)[:: -1 if number % 2 else 1]:
                seconds[name].append(running[name].encode())
        peaks = {name: contender.end() for name, contender in running.items()}
        expected = np.load(running["timm"].features)
        errors = {
            name: float(np.linalg.norm(np.load(one.features) - expected) / np.linalg.norm(expected))
            for name, one in running.items()
        }
    others = [name for name in running if name not in (ALL_TOKENS, MASKED)]
    best = min(others, key=lambda name: statistics.median(seconds[name]))
    return [
        {
            "what": name,
            "why_not": refused[name],
            **(
                {
                    "ms": statistics.median(seconds[name]) / arguments.batch * 1e3,
                    "of_timm": median_ratio(seconds["timm"], seconds[name]),
                    "of_best": median_ratio(seconds[best], seconds[name]),
                    "best": best,
                    "build_s": running[name].build_s,
                    "peak_gib": peaks[name],
                    "error": errors[name],
                }
                if name in running
                else {}
            ),
        }
        for name in CONTENDERS
    ]


class _Contender:
    """A process of ``encoder_contenders.py`` that encodes a batch when asked."""

    def __init__(self, title: str, dtype: str, name: str, arguments: argparse.Namespace, features: Path) -> None:
        self.features = features
        options = ["--threads", str(arguments.threads), "--batch", str(arguments.batch), "--features", str(features)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.cpu.encoder_contenders", title, dtype, name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.build_s = float(self._answer().split()[1])

    def encode(self) -> float:
        assert self._process.stdin is not None, "the process has a pipe"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def end(self) -> float:
        """End the process and return its peak memory in GiB."""
        assert self._process.stdin is not None, "the process has a pipe"
        self._process.stdin.close()
        peak = float(self._answer())
        self._process.wait()
        return peak

    def _answer(self) -> str:
        assert self._process.stdout is not None, "the process has a pipe"
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contender must answer, got exit code {self._process.wait()} of {self._process.args}")
        return answer


def commands(part: str, title: str, dtype: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Time whole commands on a set of slides in rounds; return a row for each."""
    slides = _slides(part, arguments, folder)
    folder = folder / part  # outputs of other parts, in a folder that is kept, would count too
    folder.mkdir(exist_ok=True)
    weights = folder / f"{NETWORKS[title] or 'bundled'}.pth"
    if NETWORKS[title]:
        torch.save(network_of(title)[0].state_dict(), weights)
    ours = _own_commands(part, title, dtype, slides, weights, folder)
    tiles = folder / "tiles.npz"
    first = next(iter(ours.values()))
    _run(first.called)  # untimed: fills the caches, and gives the positions of the tiles
    number = _write_tiles(first.out, slides, tiles)
    loop = [sys.executable, "-m", "bench.cpu.plain_loop", str(tiles), str(folder / "loop"), "--network", title]
    loop += ["--threads", str(arguments.threads), "--dtype"]
    called = {LOOP: [*loop, dtype], f"{LOOP}, compiled": [*loop, dtype, "--compiled"]}
    if title == "bundled":
        called[f"{LOOP}, {_PICTURES} maps"] = [*loop, dtype, "--pictures", str(_PICTURES)]
    if dtype != "float32":
        called[FLOAT32_LOOP] = [*loop, "float32"]
    called |= {name: command.called for name, command in ours.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in called}
    for turn in range(arguments.rounds):
        for name in list(called)[:: -1 if turn % 2 else 1]:
            runs[name].append(_run(called[name]))
            stages = json.loads(runs[name][-1].pop("printed")) if name not in ours else _stages(ours[name].out)
            runs[name][-1]["stages"] = stages
    walls = {name: [run["wall_s"] for run in of_name] for name, of_name in runs.items()}
    side_by_side = {name: ours[name].processes if name in ours else 1 for name in runs}
    worked = {
        name: [sum(run["stages"].values()) / side_by_side[name] for run in of_name] for name, of_name in runs.items()
    }
    return [
        {
            "what": name,
            "slides": len(slides),
            "tiles": number,
            "kept": _share_kept(ours[name].out) if name in ours else 1.0,
            "processes": side_by_side[name],
            "wall_s": statistics.median(walls[name]),
            "processor_s": statistics.median(run["processor_s"] for run in of_name),
            "of_loop": median_ratio(walls[LOOP], walls[name]),
            "of_loop_started": median_ratio(worked[LOOP], worked[name]),
            "of_float32_started": median_ratio(worked[FLOAT32_LOOP if FLOAT32_LOOP in runs else LOOP], worked[name]),
            "peak_gib": max(run["peak_gib"] for run in of_name),
            "stages": {
                stage: statistics.median(run["stages"].get(stage, 0.0) for run in of_name)
                for stage in of_name[0]["stages"]
            },
        }
        for name, of_name in runs.items()
    ]


def _own_commands(
    part: str, title: str, dtype: str, slides: Sequence[Path], weights: Path, folder: Path
) -> dict[str, _Command]:
    """Return this package's commands by name; of many slides, in one process and in as many as there are threads."""
    start = [sys.executable, "-c", _COMMAND]
    called = {}

    def add(name: str, words: Sequence[str], processes: int = 1) -> None:
        out = folder / name.replace(", ", "_").replace(":", "")
        command = [*start, *words[:1], *map(str, slides), *words[1:], "--out", str(out), "--overwrite"]
        called[f"maskattn {name}"] = _Command(command, out, processes)

    if title == "bundled":
        if part == "small":  # which it shares by itself
            add("infer", ["infer"], _PROCESSES)
        add("infer, --device cpu", ["infer", "--device", "cpu"])
        return called
    for mask in ("none", "tissue"):
        options = ["--encoder", f"timm:{NETWORKS[title]}", "--weights", str(weights), "--mag", _MAGNIFICATION[part]]
        words = ["extract", *options, "--token-mask", mask, "--dtype", dtype]
        if part == "small":  # by default one of the two, by the size of the weights
            add(f"extract, {mask}, --devices cpu:{_PROCESSES}", [*words, "--devices", f"cpu:{_PROCESSES}"], _PROCESSES)
            add(f"extract, {mask}, --device cpu", [*words, "--device", "cpu"])
        else:
            add(f"extract, {mask}", words)
    return called


def _slides(part: str, arguments: argparse.Namespace, folder: Path) -> list[Path]:
    if part == "real":
        return [arguments.region]
    if part == "composed":
        return [composed(arguments.region, folder, arguments.side)]
    return _sections(arguments.region, folder / "sections", arguments.slides)


def _sections(region: Path, folder: Path, count: int) -> list[Path]:
    """Cut overlapping squares of the region, each a tiled pyramid of its own."""
    folder.mkdir(exist_ok=True)
    with openslide.OpenSlide(region) as source:
        spacing_um = float(source.properties[openslide.PROPERTY_NAME_MPP_X])
        whole = np.asarray(source.read_region((0, 0), 0, source.dimensions))[..., :3]
    random = np.random.default_rng(0)
    tops, lefts = (random.integers(0, side - SECTION_PX, count) // 16 * 16 for side in whole.shape[:2])
    paths = []
    for number, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        paths.append(folder / f"section_{number:03}.tiff")
        if paths[-1].exists():
            continue
        square = whole[top : top + SECTION_PX, left : left + SECTION_PX]
        with tifffile.TiffWriter(paths[-1]) as file:
            for downsample in (1, 4):
                side = SECTION_PX // downsample
                file.write(
                    square.reshape(side, downsample, side, downsample, 3).mean(axis=(1, 3)).astype(np.uint8),
                    photometric="rgb",
                    tile=(256, 256),
                    compression="jpeg",
                    metadata=None,
                    subfiletype=int(downsample > 1),
                    resolution=(1e4 / (spacing_um * downsample),) * 2,
                    resolutionunit="CENTIMETER",
                )
    return paths


def _run(command: list[str]) -> dict[str, Any]:
    """Run a command; return its wall and processor time, and the peak memory of its processes together."""
    peaks, ended = [0], threading.Event()

    def watch(pid: int) -> None:
        while not ended.wait(0.1):
            peaks.append(resident_bytes(pid))

    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        assert process.stdout is not None, "the process has a pipe"
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - start
        ended.set()
        watcher.join()
    if process.returncode not in (0, 1):  # 1: a section without tissue
        raise RuntimeError(f"a command must succeed to be timed, got exit code {process.returncode} of {command}")
    processor_s = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall_s, "processor_s": processor_s, "peak_gib": max(peaks) / 2**30, "printed": printed}


def _records(out: Path) -> list[dict[str, Any]]:
    paths = [*out.rglob("*.extraction.json"), *out.rglob("prediction.json")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]


def _stages(out: Path) -> dict[str, float]:
    """Return the seconds of each stage, over all slides of a run."""
    seconds: Counter[str] = Counter()
    for record in _records(out):
        seconds.update(record["timings_s"])
    return dict(seconds)


def _share_kept(out: Path) -> float:
    """Return the share of the kept tiles' tokens that took part."""
    kept = total = 0
    for record in _records(out):
        counts = record.get("counts", record)
        kept += counts["kept_tokens"]
        side = None if "tokens" in record else record["settings"]["tile_px"] // record["settings"]["token_px"]
        total += record["tokens"] if side is None else counts["kept_tiles"] * side**2
    return kept / total


def _write_tiles(out: Path, slides: Sequence[Path], path: Path) -> int:
    """Write the positions of all slides' tiles as the plain loop takes them; return their number."""
    arrays: dict[str, Any] = {}
    by_name = {slide.stem: slide for slide in slides}
    number = 0
    for file in out.rglob("*.h5"):
        name = file.parent.name if file.name == "features.h5" else file.stem
        if name not in by_name:
            continue  # another of the slide's files
        with h5py.File(file) as opened:
            if "features" in opened:
                arrays[str(by_name[name])] = opened["coords"][:]
                arrays[f"{by_name[name]}:side"] = opened["coords"].attrs["patch_size_level0"]
                number += len(opened["coords"])
    np.savez(path, **arrays)
    return number


def _conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "batch": arguments.batch,
        "side": arguments.side,
        "cpu": f"{cpu_name()}, {_instructions(arguments.held_to)}, {len(os.sched_getaffinity(0))} cores",
        "commit": commit_id(),
        "versions": installed_versions("timm", "openvino", "onnxruntime"),
        "date": f"{datetime.datetime.now(datetime.UTC):%d %B %Y}",
    }


def _instructions(held_to: str | None) -> str:
    if held_to:
        return f"torch and our kernels held to {held_to}"
    dots, tiles = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.cpu._is_amx_tile_supported()
    products = "AMX tiles of bfloat16" if tiles else "bfloat16 products"
    return f"{torch.backends.cpu.get_cpu_capability()} with{'' if dots else 'out'} {products}"


if __name__ == "__main__":
    main()
