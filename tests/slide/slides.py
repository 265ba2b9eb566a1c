"""Small slides for tests: stained blobs on glass, as the tiled pyramidal TIFFs that OpenSlide opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile

GLASS = (243, 242, 244)
STAIN = (205, 120, 170)


@dataclass(frozen=True)
class DrawnSlide:
    """A slide on disk and what was drawn on it: rgb_HW3 is its level 0, tissue_HW is True where the stain is."""

    path: Path
    rgb_HW3: np.ndarray
    tissue_HW: np.ndarray


def draw_tissue(width: int, height: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two stained blobs on noisy glass, (H, W, 3) uint8, and their mask, (H, W) bool."""
    rng = np.random.default_rng(seed)
    tissue = np.zeros((height, width), np.uint8)
    side = min(width, height)
    for x, y, size in ((0.35, 0.4, 0.22), (0.75, 0.7, 0.16)):
        angle = float(rng.uniform(0, 180))
        axes = (max(1, round(side * size)), max(1, round(side * size * 0.7)))
        cv2.ellipse(tissue, (round(width * x), round(height * y)), axes, angle, 0, 360, 1, -1)
    rgb = np.where(tissue[..., None] > 0, np.array(STAIN), np.array(GLASS))
    noise = rng.integers(-3, 4, (height, width, 1)) + rng.integers(-25, 26, (height, width, 1)) * tissue[..., None]
    return np.clip(rgb + noise, 0, 255).astype(np.uint8), tissue > 0


def write_pyramid(
    path: Path,
    rgb_HW3: np.ndarray,
    spacing_um: float | tuple[float, float] | None = 0.5,
    downsamples: tuple[int, ...] = (4, 16),
    tile: int = 256,
) -> Path:
    """Write a tiled TIFF with smaller levels; None for spacing_um leaves the resolution out, a pair gives x and y."""
    x_um, y_um = spacing_um if isinstance(spacing_um, tuple) else (spacing_um, spacing_um)
    height, width = rgb_HW3.shape[:2]
    with tifffile.TiffWriter(path) as writer:
        for downsample in (1, *downsamples):
            size = (max(1, width // downsample), max(1, height // downsample))
            level = rgb_HW3 if downsample == 1 else cv2.resize(rgb_HW3, size, interpolation=cv2.INTER_AREA)
            resolution = {}
            if x_um is not None and y_um is not None:
                resolution = {
                    "resolution": (1e4 / (x_um * downsample), 1e4 / (y_um * downsample)),
                    "resolutionunit": "CENTIMETER",
                }
            writer.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=int(downsample > 1),
                metadata=None,
                **resolution,
            )
    return path


def make_slide(
    path: Path,
    width: int = 1024,
    height: int = 768,
    spacing_um: float | tuple[float, float] | None = 0.5,
    downsamples: tuple[int, ...] = (4,),
    seed: int = 0,
) -> DrawnSlide:
    """Draw stained blobs on glass and write them as a slide."""
    rgb, tissue = draw_tissue(width, height, seed)
    return DrawnSlide(write_pyramid(path, rgb, spacing_um, downsamples), rgb, tissue)


def make_blank_slide(path: Path, width: int = 1024, height: int = 768, spacing_um: float = 0.5) -> Path:
    """A slide that shows only noisy glass."""
    rng = np.random.default_rng(0)
    rgb = np.clip(np.array(GLASS) + rng.integers(-3, 4, (height, width, 3)), 0, 255).astype(np.uint8)
    return write_pyramid(path, rgb, spacing_um, downsamples=(4,))


def damage_tile(path: Path, tile: int, level: int = 0) -> None:
    """Overwrite one compressed tile of a level, so that the slide opens but that tile does not decode."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[level]
        offset, size = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
