"""Extraction compared with a plain timm loop over the same tiles: time and peak memory for ViT-S, B and L.

    python -m bench.cpu.extract [--threads 1] [--rounds 3] [--quick]

The bench draws a slide whose mask keeps 30 % of the tokens of every tile. The plain loop reads the same tiles with the
same reader, runs timm's network and writes the features. Extraction runs completely, from opening the slide to closing
the file, with every token (``none``) and with masked attention (``tissue``), in float32 and in bfloat16. Weights are
random. Peak memory is measured in a separate process for each contender. Writes bench/results/extract.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import tifffile
import torch
from PIL import Image

import bench.without_torchvision  # noqa: F401 (before timm)
from bench.timing import kind_of_time, median_ratio, rounds_of
from maskattn.nn import TileEncoder, from_timm
from maskattn.nn.encoders import EncoderCard
from maskattn.nn.encoders.pixels import normalised
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slide, identify_encoder
from maskattn.slide.manifest import SlideJob
from maskattn.slide.reader import SlideReader

RESULTS = Path(__file__).parents[1] / "results" / "extract.md"
TILE_PX, TOKENS, BATCH = 224, 14, 16
KEPT = 59  # of 196 tokens
# Enough tiles that the fixed cost of opening and closing the files is as small as for a real slide.
NETWORKS = {
    "ViT-S/16": ("vit_small_patch16_224", 64),
    "ViT-B/16": ("vit_base_patch16_224", 32),
    "ViT-L/16": ("vit_large_patch16_224", 16),
}
CONTENDERS = ("timm", "none", "tissue")
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="try the bench with a few tiles and a small network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS, metavar=("NETWORK", "CONTENDER", "FOLDER"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    networks = {"ViT-Ti/16": ("vit_tiny_patch16_224", 4)} if arguments.quick else NETWORKS
    if arguments.alone:
        network, contender, folder = arguments.alone
        _calls(network, Path(folder), [contender])[f"{contender}, float32"]()
        print(own_peak_gib())
        return
    seconds: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, dict[str, float]] = {}
    for title, (network, tiles) in networks.items():
        with tempfile.TemporaryDirectory() as folder:
            _draw(Path(folder), tiles)
            calls = _calls(network, Path(folder))
            _check_same(Path(folder), calls)
            timed = rounds_of(calls, 1 if arguments.quick else arguments.rounds)
        seconds[title] = {name: [taken / tiles for taken in of_rounds] for name, of_rounds in timed.items()}
        _write(arguments, seconds, memory)
    # Memory comes last because it takes long, so that the timings are recorded before.
    for title, (network, _tiles) in networks.items():
        with tempfile.TemporaryDirectory() as folder:
            _draw(Path(folder), BATCH)
            memory[title] = {name: _memory_gib(network, name, folder, arguments) for name in CONTENDERS}
        _write(arguments, seconds, memory)


def _draw(folder: Path, tiles: int) -> None:
    """Draw a slide of textured tiles, and a mask that keeps a blob of 59 of the 196 tokens of each.

    The slide has coarse levels, as scanners write them: without them the view of the whole slide, which the mask is
    checked against, would decode every tile once more, and the plain loop makes no such view.
    """
    random = np.random.default_rng(0)
    pixels = random.integers(90, 230, (TILE_PX, TILE_PX * tiles, 3), dtype=np.uint8)
    with tifffile.TiffWriter(folder / "slide.tiff") as file:
        for downsample in (1, 4, 16):
            height, width = TILE_PX // downsample, TILE_PX * tiles // downsample
            file.write(
                pixels.reshape(height, downsample, width, downsample, 3).mean(axis=(1, 3)).astype(np.uint8),
                photometric="rgb",
                tile=(256, 256),
                compression="jpeg",
                metadata=None,
                subfiletype=int(downsample > 1),
                resolution=(2e4 / downsample, 2e4 / downsample),
                resolutionunit="CENTIMETER",
            )
    keep = np.zeros((TOKENS, TOKENS), np.uint8)
    keep[2:9, 3:11] = 1
    keep[9, 3:6] = 1
    assert keep.sum() == KEPT
    Image.fromarray(np.tile(keep, (1, tiles))).save(folder / "mask.png")


def _calls(network: str, folder: Path, contenders: Sequence[str] = CONTENDERS) -> dict[str, Callable[[], object]]:
    """Return the functions to time, by name; only the networks that the contenders need are kept."""
    import timm  # after bench.without_torchvision

    torch.manual_seed(0)
    theirs = timm.create_model(network, num_classes=0).eval()
    card = EncoderCard(network, "token", (0.5,) * 3, (0.5,) * 3, TILE_PX, TILE_PX, 0.5)
    calls: dict[str, Callable[[], object]] = {}
    masks = [name for name in contenders if name != "timm"]
    if masks:
        ours = TileEncoder(from_timm(theirs, copy="timm" in contenders), card)  # else not copied, as in load_encoder
        job, identity = SlideJob("slide", folder / "slide.tiff", mask_path=folder / "mask.png"), identify_encoder(ours)
    if "timm" not in contenders:
        del theirs
    for dtype in DTYPES:
        if "timm" in contenders:
            calls[f"timm, {dtype}"] = _plain_loop(theirs, folder, dtype)
        for mask in masks:
            settings = ExtractSettings(
                folder / f"{mask}_{dtype}",
                token_mask=mask,
                dtype=dtype,
                batch_size=BATCH,
                overwrite=True,
                force=True,
            )
            calls[f"{mask}, {dtype}"] = lambda settings=settings: extract_slide(job, ours, settings, identity=identity)
    return calls


def _plain_loop(theirs: torch.nn.Module, folder: Path, dtype: str) -> Callable[[], object]:
    """Return a function that runs the slide's tiles in batches through timm's network and writes the features."""
    half = torch.full((3,), 0.5)

    @torch.inference_mode()
    def loop() -> None:
        features = []
        with SlideReader(folder / "slide.tiff", isolated=True) as reader:
            places = range(0, reader.info.width_px, TILE_PX)
            for first in range(0, len(places), BATCH):
                tiles = [
                    reader.read_region(x, 0, (TILE_PX, TILE_PX), (TILE_PX, TILE_PX))
                    for x in places[first : first + BATCH]
                ]
                pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    features.append(theirs(normalised(pixels, half, half)).float().numpy())
        with h5py.File(folder / f"timm_{dtype}.h5", "w") as file:
            file["features"] = np.concatenate(features)

    return loop


def _check_same(folder: Path, calls: dict[str, Callable[[], object]]) -> None:
    """Check that the contenders' features agree before they are timed."""
    for name in ("timm, float32", "none, float32"):
        calls[name]()
    with h5py.File(folder / "timm_float32.h5") as file:
        theirs = torch.from_numpy(file["features"][:])
    (path,) = (folder / "none_float32").rglob("features_*/slide.h5")
    with h5py.File(path) as file:
        cosine = torch.cosine_similarity(theirs, torch.from_numpy(file["features"][:]))
    assert cosine.min() > 0.999999, f"features differ: cosine {cosine.min()}"


def own_peak_gib() -> float:
    """Return the peak of this process since it began; rusage would include its parent's memory at the fork."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024**2


def _memory_gib(network: str, contender: str, folder: str, arguments: argparse.Namespace) -> float:
    """Measure the peak resident memory of a process that loads the network and runs once."""
    alone = ["--alone", network, contender, folder, "--threads", str(arguments.threads)]
    command = [sys.executable, "-m", "bench.cpu.extract", *alone, *(["--quick"] if arguments.quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _write(
    arguments: argparse.Namespace, seconds: dict[str, dict[str, list[float]]], memory: dict[str, dict[str, float]]
) -> None:
    lines = _head(arguments)
    for title, of_network in seconds.items():
        for name, taken in of_network.items():
            contender, dtype = name.split(", ")
            called = "plain timm loop" if contender == "timm" else f"`--token-mask {contender}`"
            peak = memory.get(title, {}).get(contender) if dtype == "float32" else None
            lines.append(
                f"| {title} | {called} | {dtype} | {statistics.median(taken) * 1e3:.0f} | "
                f"{median_ratio(of_network[f'timm, {dtype}'], taken):.2f} | "
                f"{median_ratio(of_network[f'{contender}, float32'], taken):.2f} | "
                f"{'' if peak is None else f'{peak:.2f}'} |"
            )
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(arguments: argparse.Namespace) -> list[str]:
    share = KEPT / TOKENS**2
    return [
        "# Extraction beside a plain timm loop",
        "",
        f"`python -m bench.cpu.extract --threads {arguments.threads} --rounds {arguments.rounds}` on "
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, on "
        f"{datetime.datetime.now(datetime.UTC):%d %B %Y}: {kind_of_time()}, medians of {arguments.rounds} rounds in "
        "which all take turns, and medians over the rounds of the ratios of one round; "
        f"{', '.join(f'{tiles} tiles for {name}' for name, (_, tiles) in NETWORKS.items())}, of {TILE_PX} px, "
        f"{BATCH} in a batch. Of the kept tiles' tokens {share:.3f} hold tissue, so that 1/f = {1 / share:.2f}.",
        "",
        "| network | what | dtype | ms a tile | times as fast as the loop | as its float32 | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
