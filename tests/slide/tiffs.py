"""TIFFs of many layouts for tests of the second reader, drawn with tifffile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

SPACING = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}


def draw(width: int = 1000, height: int = 700, seed: int = 0) -> np.ndarray:
    """A smooth picture of many colours, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def halved(rgb: np.ndarray, times: int) -> np.ndarray:
    """The picture at 1 / 2**times of its size."""
    size = rgb.shape[1] >> times, rgb.shape[0] >> times
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def write_ome(
    path: Path, rgb: np.ndarray, layout: str = "chunky", levels: int = 3, tile: int | None = 256, **options: Any
) -> list[np.ndarray]:
    """An OME-TIFF with its levels in SubIFDs; layout is "chunky", "planar" or "pages" (one per colour)."""
    said = {"axes": "YXS" if layout == "chunky" else "CYX", **SPACING, **options.pop("metadata", {})}
    options = {"compression": "adobe_deflate", "photometric": "minisblack" if layout == "pages" else "rgb"} | options
    if layout == "planar":
        options["planarconfig"] = "separate"
    if tile is not None:
        options["tile"] = (tile, tile)
    pyramid = [rgb, *(halved(rgb, times) for times in range(1, levels))]
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number, level in enumerate(pyramid):
            pixels = level if layout == "chunky" else level.transpose(2, 0, 1)
            own = {"subifds": levels - 1, "metadata": said} if number == 0 else {"subfiletype": 1}
            writer.write(pixels, **own, **options)
    return pyramid


def blank_tile(path: Path, tile: int) -> None:
    """Set a tile's offset and byte count to 0, as writers of sparse slides do."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages.first
        for name in ("TileOffsets", "TileByteCounts"):
            values = list(page.tags[name].value)
            values[tile] = 0
            page.tags[name].overwrite(values)
