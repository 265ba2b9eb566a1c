"""Processor time and peak memory of one epoch on 500 slides × 5,000 tiles × 1,536 channels that stay on disk.

    python -m bench.cpu.train_epoch [--threads 2] [--slides 500] [--model abmil] [--tiles-per-slide N] [--quick]

Features in float16, 7.2 GiB in TRIDENT's layout, are written to a temporary folder below --scratch and deleted at the
end. Training runs in a separate process; its phases are measured in processor time, user and system, since the machine
may be shared. With fewer slides, the page also extrapolates the time to 500 slides. Writes
bench/results/train_epoch.md, or the file that --out names.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.pages import publish
from maskattn.slide.layouts import TileFeatures, write_features

RESULTS = Path(__file__).parents[1] / "results" / "train_epoch.md"
CHANNELS, TILES, SLIDES = 1536, 5000, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slides", type=int, default=SLIDES)
    parser.add_argument("--model", default="abmil", help="a model of maskattn train")
    parser.add_argument("--tiles-per-slide", type=int, help="tiles that training draws per slide; all by default")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quick", action="store_true", help="try the bench with a few small slides")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.alone:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(_one_epoch(arguments.alone, arguments.model, arguments.tiles_per_slide)))
        return
    slides, tiles = (10, 300) if arguments.quick else (arguments.slides, TILES)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        size_gib = _draw(Path(folder), slides, tiles)
        found = _in_its_own_process(Path(folder), arguments)
    publish(_lines(found, slides, tiles, size_gib, arguments), arguments.out)


def _draw(folder: Path, slides: int, tiles: int) -> float:
    """Write the cohort and return its size in GiB."""
    rng = np.random.default_rng(0)
    noise_TC = rng.standard_normal((tiles, CHANNELS), np.float32).astype(np.float16)
    side = int(np.ceil(np.sqrt(tiles)))
    coords_T2 = 256 * np.stack([np.arange(tiles) % side, np.arange(tiles) // side], axis=1)
    rows, total = ["slide_id,label"], 0
    for index in range(slides):
        features_TC = np.roll(noise_TC, (index * 97, index * 31), (0, 1))
        features_TC[: tiles // 10, 0] += 2 * (index % 2)
        header = {"encoder": "drawn", "spacing_um": 0.5, "token_mask": "none", "layout": "trident"}
        features = TileFeatures(
            slide_id=f"s{index}",
            patch_size_px=256,
            patch_size_lv0=256,
            width_px=256 * side,
            height_px=256 * side,
            spacing_lv0_um=0.5,
            coords_T2=coords_T2,
            features_TC=features_TC,
            source=folder,
            **header,
        )
        total += write_features("trident", folder / "features", features).stat().st_size
        rows.append(f"s{index},{index % 2}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return total / 2**30


def _in_its_own_process(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "bench.cpu.train_epoch",
        "--threads",
        str(arguments.threads),
        "--alone",
        str(folder),
    ]
    command += ["--model", arguments.model]
    command += [] if arguments.tiles_per_slide is None else ["--tiles-per-slide", str(arguments.tiles_per_slide)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


class Clock:
    """Processor time at the end of each phase of a training."""

    def __init__(self) -> None:
        self.marks = {"start": time.process_time()}

    def looked_through(self, slide_id: str, done: int, slides: int) -> None:
        """Mark that the features have been found."""
        self.marks["features"] = time.process_time()

    def batch_done(self, epoch: int, done: int, batches: int) -> None:
        """Mark that a batch was trained."""
        self.marks["batches"] = time.process_time()

    def epoch_done(self, row: dict[str, float], best: bool) -> None:
        """Mark that the epoch was validated."""
        self.marks["epoch"] = time.process_time()


def _one_epoch(folder: Path, model: str, tiles_per_slide: int | None) -> dict[str, float]:
    from maskattn.training.cohort import cohort_of
    from maskattn.training.settings import TrainSettings
    from maskattn.training.train import train_model, validation_split

    settings = TrainSettings(
        features=folder / "features",
        labels=folder / "labels.csv",
        target="label",
        task="binary",
        epochs=1,
        device="cpu",
        model=model,
        tiles_per_slide=tiles_per_slide,
    )
    cohort = cohort_of(settings)
    clock, began = Clock(), time.perf_counter()
    train_model(settings, cohort, validation_split(cohort, 0.2, 0), folder / "run", progress=clock)
    marks = clock.marks
    return {
        "features": marks["features"] - marks["start"],
        "training": marks["batches"] - marks["features"],
        "validation": marks["epoch"] - marks["batches"],
        "wall": time.perf_counter() - began,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _lines(
    found: dict[str, float], slides: int, tiles: int, size_gib: float, arguments: argparse.Namespace
) -> list[str]:
    drawn = "all" if arguments.tiles_per_slide is None else f"{arguments.tiles_per_slide:,}"
    seen = {"features": slides, "training": slides - slides // 5, "validation": slides // 5}
    parts = {
        "features": "looking through all features, once for a run, for NaN and other encoders",
        "training": "training, one epoch",
        "validation": "validation",
    }
    whole = slides >= SLIDES
    more = "" if whole else f" of {SLIDES} slides, extrapolated |"
    table = [f"| part of the run | slides | seconds of processor time | of a slide |{more}"]
    table.append("|---|---|---|---|" + ("" if whole else "---|"))
    for name, words in parts.items():
        extrapolated = "" if whole else f" {found[name] * SLIDES / slides:.0f} |"
        table.append(f"| {words} | {seen[name]} | {found[name]:.0f} | {found[name] / seen[name]:.2f} |{extrapolated}")
    return [
        "# One epoch on features that stay on disk",
        "",
        f"`python -m bench.cpu.train_epoch --threads {arguments.threads} --slides {slides} --model {arguments.model}` "
        f"on {platform.machine()}, torch {torch.__version__}: {slides} slides × {tiles:,} tiles × {CHANNELS:,} "
        f"channels in float16, {size_gib:.1f} GiB; four of five patients teach with {drawn} of their tiles, one judges "
        f"with all. Seconds of processor time, user and system, summed over {arguments.threads} thread(s), since the "
        "machine was shared.",
        "",
        *table,
        "",
        f"Peak memory of the process: {found['peak_gib']:.2f} GiB.",
    ]


if __name__ == "__main__":
    main()
