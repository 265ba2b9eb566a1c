"""A plain loop over slides with timm and OpenSlide, as TRIDENT has it: without anything of this package.

    python -m bench.cpu.plain_loop TILES.npz OUT --network ViT-S/16 --dtype float32 [--compiled] [--pictures 4]

Tiles come from a DataLoader: ``read_region`` of the level that is at least as fine as needed, PIL's resize, a float
tensor, normalised; batches go through timm's network, under autocast for bfloat16, and features and coordinates into an
HDF5 file for each slide. The positions of the tiles are given (TILES.npz), so that the loop spends nothing on finding
tissue. With ``--pictures`` it draws so many maps of a slide as TRIDENT draws them: scores of the tiles by rank in a
colour map of matplotlib, mixed with the slide by OpenCV, written as PNG by Pillow. The scores are features' products
with random vectors, so that they cost nothing. Prints its seconds per stage as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import h5py
import numpy as np
import openslide
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.cpu.encoder_contenders import DTYPES, NETWORKS, network_of

BATCH = 32
PICTURE_PX = 1536  # the longer side of a thumbnail under this package's maps


class SlideTiles(Dataset[Tensor]):
    """The tiles of one slide as normalised float tensors."""

    def __init__(self, path: str, coords_T2: np.ndarray, tile_lv0: int, tile_px: int) -> None:
        self.path, self.coords_T2, self.tile_lv0, self.tile_px = path, coords_T2, tile_lv0, tile_px
        self.slide: openslide.OpenSlide | None = None

    def __len__(self) -> int:
        return len(self.coords_T2)

    def __getitem__(self, item: int) -> Tensor:
        if self.slide is None:  # opened in the worker
            self.slide = openslide.OpenSlide(self.path)
        level = self.slide.get_best_level_for_downsample(self.tile_lv0 / self.tile_px * 1.1)
        side = round(self.tile_lv0 / self.slide.level_downsamples[level])
        x, y = self.coords_T2[item].tolist()
        tile = self.slide.read_region((x, y), level, (side, side)).convert("RGB")
        tile = tile.resize((self.tile_px, self.tile_px), Image.Resampling.BICUBIC) if side != self.tile_px else tile
        pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255
        return (pixels - 0.5) / 0.5


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="ViT-S/16")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=0, help="maps drawn of each slide")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network, tile_px = network_of(arguments.network)
    called = torch.compile(network) if arguments.compiled else network
    arguments.out.mkdir(parents=True, exist_ok=True)
    stages = {"read": 0.0, "encode": 0.0, "write": 0.0}
    with np.load(arguments.tiles, allow_pickle=False) as given:
        slides = {path: (given[path], int(given[f"{path}:side"])) for path in given.files if ":side" not in path}
    for path, (coords_T2, tile_lv0) in slides.items():
        tiles = SlideTiles(path, coords_T2, tile_lv0, tile_px)
        batches = iter(DataLoader(tiles, batch_size=BATCH, num_workers=arguments.workers))
        features = []
        start = time.perf_counter()
        while (images := next(batches, None)) is not None:
            stages["read"] += time.perf_counter() - start
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                features.append(called(images).float().numpy())
            stages["encode"] += time.perf_counter() - start
            start = time.perf_counter()
        stages["read"] += time.perf_counter() - start
        start = time.perf_counter()
        with h5py.File(arguments.out / f"{Path(path).stem}.h5", "w") as file:
            file["features"], file["coords"] = np.concatenate(features), coords_T2
        if arguments.pictures:
            _draw(Path(path), np.concatenate(features), coords_T2, tile_lv0, arguments.out, arguments.pictures)
        stages["write"] += time.perf_counter() - start
    print(json.dumps(stages))


def _draw(path: Path, features_TC: np.ndarray, coords_T2: np.ndarray, tile_lv0: int, out: Path, pictures: int) -> None:
    """Write maps over the slide, at the finest of its levels that has at most as many pixels as the other commands'."""
    import cv2
    from matplotlib import colormaps

    vectors = np.random.default_rng(0).standard_normal((pictures, features_TC.shape[1]))
    with openslide.OpenSlide(path) as slide:
        level = next((i for i, size in enumerate(slide.level_dimensions) if max(size) <= PICTURE_PX), -1)
        size, downsample = slide.level_dimensions[level], slide.level_downsamples[level]
        shown = np.asarray(slide.read_region((0, 0), level, size).convert("RGB"))
    side = int(np.ceil(tile_lv0 / downsample))
    for number, scores_T in enumerate(vectors @ features_TC.T):
        ranks_T = (scores_T.argsort().argsort() + 1) / len(scores_T)
        total, count = np.zeros(shown.shape[:2]), np.zeros(shown.shape[:2], np.uint16)
        for (x, y), rank in zip(np.ceil(coords_T2 / downsample).astype(int).tolist(), ranks_T, strict=True):
            total[y : y + side, x : x + side] += rank
            count[y : y + side, x : x + side] += 1
        coloured = np.zeros_like(shown)
        covered = count > 0
        coloured[covered] = (colormaps["coolwarm"](total[covered] / count[covered]) * 255).astype(np.uint8)[:, :3]
        Image.fromarray(cv2.addWeighted(shown, 0.6, coloured, 0.4, 0)).save(out / f"{path.stem}_{number}.png")


if __name__ == "__main__":
    main()
