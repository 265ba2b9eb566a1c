"""Levels whose axes are scaled differently, as rounding makes of odd sizes: every pixel lands where it was drawn."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from slides import GLASS, STAIN

from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import find_tissue

SIZES = [
    ((16000, 375), (4000, 93)),
    ((375, 16000), (93, 4000)),
    ((5001, 2003), (2500, 1001)),
    ((9000, 700), (4500, 340)),
]


def wave(pixels: int) -> np.ndarray:
    """A sine of 64 px: half a pixel off is 5 grey values."""
    return 128 + 100 * np.sin((np.arange(pixels) + 0.5) * 2 * np.pi / 64)


def write_levels(path: Path, level_sizes: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    """A slide whose levels each show waves in their own pixels, along x in red and along y in green."""
    levels = []
    with tifffile.TiffWriter(path) as writer:
        for number, (width, height) in enumerate(level_sizes):
            rgb = np.full((height, width, 3), 128, np.uint8)
            rgb[..., 0] = np.rint(wave(width))
            rgb[..., 1] = np.rint(wave(height))[:, None]
            options = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"} if number == 0 else {"subfiletype": 1}
            writer.write(rgb, tile=(256, 256), photometric="rgb", compression="adobe_deflate", metadata=None, **options)
            levels.append(rgb)
    return levels


@pytest.mark.parametrize("sizes", SIZES)
def test_a_complete_level_is_read_as_it_was_drawn(tmp_path: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    levels = write_levels(tmp_path / "s.tif", sizes)
    region = SlideReader(tmp_path / "s.tif").read_region(0, 0, sizes[0], sizes[1])
    assert np.abs(region.astype(int) - levels[1]).max() <= 3


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("corner", ["left upper", "right upper", "left lower", "right lower"])
def test_a_coarse_level_is_read_at_the_right_position(
    tmp_path: Path, sizes: tuple[tuple[int, int], ...], corner: str
) -> None:
    levels = write_levels(tmp_path / "s.tif", sizes)
    ratio = sizes[0][0] / sizes[1][0], sizes[0][1] / sizes[1][1]
    x_px = max(0, sizes[1][0] - 301) if "right" in corner else 0
    y_px = max(0, sizes[1][1] - 301) if "lower" in corner else 0
    width, height = min(301, sizes[1][0]), min(301, sizes[1][1])
    x_lv0, y_lv0 = round(x_px * ratio[0]), round(y_px * ratio[1])
    size_lv0 = (round(width * ratio[0]), round(height * ratio[1]))
    region = SlideReader(tmp_path / "s.tif").read_region(x_lv0, y_lv0, size_lv0, (width, height))
    wanted = levels[1][y_px : y_px + height, x_px : x_px + width]
    off = np.abs(region.astype(int) - wanted)[1:-1, 1:-1]
    assert off.max() <= 6  # little more than half a pixel of the level


def test_tissue_at_the_far_end_of_a_thin_strip_is_found_where_it_lies(tmp_path: Path) -> None:
    rgb = np.full((375, 16000, 3), GLASS, np.uint8)
    for centre in (1000, 15000):
        cv2.ellipse(rgb, (centre, 187), (700, 150), 0, 0, 360, STAIN, -1)
    with tifffile.TiffWriter(tmp_path / "strip.tif") as writer:
        options = {"tile": (256, 256), "photometric": "rgb", "compression": "adobe_deflate", "metadata": None}
        writer.write(rgb, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options)
        for size in ((4000, 93), (1000, 23)):
            writer.write(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), subfiletype=1, **options)
    tissue = find_tissue(SlideReader(tmp_path / "strip.tif"))
    columns = np.flatnonzero(tissue.mask_HW.any(axis=0))
    ends = [columns[0], columns[columns < 500][-1] + 1, columns[columns > 500][0], columns[-1] + 1]
    assert np.allclose(np.array(ends) * tissue.px_lv0[0], [300, 1700, 14300, 15700], atol=2 * tissue.px_lv0[0])
