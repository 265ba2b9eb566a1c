from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from slides import write_pyramid
from test_stains import EOSIN, HEIGHT, WIDTH, develop, dye, found_in, piece

from maskattn.errors import SlideError
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import find_tissue
from maskattn.slide.tissue.bright_field import require_bright_field


def fluorescence() -> np.ndarray:
    shine = piece(40, 220, 0.4)[..., None] * (5, 20, 90)
    return np.clip(shine + np.random.default_rng(0).integers(0, 6, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


def fluorescence_on_pure_black() -> np.ndarray:
    return (piece(40, 220)[..., None] * (0, 0, 70)).astype(np.uint8)


def dark_field() -> np.ndarray:
    shine = piece(90, 170, 0.3)[..., None] * (180, 185, 190) + 25
    return np.clip(shine, 0, 255).astype(np.uint8)


def black() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def bright_cells_everywhere() -> np.ndarray:
    return np.random.default_rng(0).integers(20, 100, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("draw", [fluorescence, fluorescence_on_pure_black, dark_field, black, bright_cells_everywhere])
def test_a_dark_background_is_refused_unless_forced(tmp_path: Path, draw: Callable[[], np.ndarray]) -> None:
    path = tmp_path / "dark.tif"
    with pytest.raises(SlideError, match=r"bright field.*got a dark background in .*dark\.tif.*--force"):
        found_in(path, draw())
    with SlideReader(path) as reader:
        with pytest.raises(SlideError, match="dark background"):
            require_bright_field(reader)
        forced = find_tissue(reader, force=True)
    assert forced.mask_HW.shape == (HEIGHT, WIDTH)
    assert "a dark background" in forced.notes[0]
    assert "by force" in forced.notes[0]


def test_a_section_that_fills_a_slide_and_is_stained_darkly_is_no_dark_field(tmp_path: Path) -> None:
    thickness = np.random.default_rng(0).normal(1, 0.3, (HEIGHT, WIDTH)).clip(0.1)
    mask = found_in(tmp_path / "dense.tif", develop(dye(thickness, (0.65, 0.70, 0.29), 0.5)))
    assert mask.tissue_fraction > 0.98


@pytest.mark.parametrize("with_glass", [True, False])
def test_black_where_nothing_was_scanned_is_no_dark_field(tmp_path: Path, with_glass: bool) -> None:
    tissue = piece(20, 90, 0.3) if with_glass else np.random.default_rng(0).normal(1, 0.2, (HEIGHT, WIDTH)).clip(0.2)
    rgb = develop(dye(tissue, EOSIN, 0.5))
    rgb[:, 100:] = 0
    mask = found_in(tmp_path / "padded.tif", rgb).mask_HW
    assert mask[:, :98][tissue[:, :98] > 0].mean() > 0.97
    assert not mask[:, 104:].any()


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2), (0, 255), (0, 128, 255)])
@pytest.mark.parametrize("grey", [True, False])
def test_a_label_mask_in_place_of_its_slide_is_refused(tmp_path: Path, values: tuple[int, ...], grey: bool) -> None:
    plane = np.zeros((HEIGHT * 4, WIDTH * 4), np.uint8)
    for index, value in enumerate(values):
        cv2.circle(plane, (200 + 150 * index, 300), 140, value, -1)
    path = tmp_path / "labels.tif"
    if grey:
        resolution = {"resolution": (5000, 5000), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, plane, tile=(256, 256), compression="adobe_deflate", metadata=None, **resolution)
    else:
        write_pyramid(path, np.repeat(plane[..., None], 3, axis=2), 2.0)
    with SlideReader(path) as reader, pytest.raises(SlideError, match=r"label mask|dark background"):
        find_tissue(reader)


def test_a_black_and_white_mask_is_called_a_label_mask(tmp_path: Path) -> None:
    plane = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    plane[40:120, 60:150] = 0
    with pytest.raises(SlideError, match=r"flat grey areas of the values 0, 255 alone .* --mask"):
        found_in(tmp_path / "mask.tif", plane)
