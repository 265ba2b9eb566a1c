"""Tissue of many stains, on many kinds of glass, drawn at 8 µm per pixel, the resolution of the tissue search."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from slides import write_pyramid

from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import TissueMask, find_tissue

HAEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)
BLUE, RED, GREEN = (0.85, 0.51, 0.11), (0.10, 0.74, 0.67), (0.92, 0.26, 0.28)
PAS, SILVER = (0.18, 0.97, 0.15), (0.57, 0.58, 0.59)
HEIGHT, WIDTH = 180, 260


def piece(left: int, right: int, texture: float = 0.0, seed: int = 0) -> np.ndarray:
    """(H, W) thickness, about 1 within an ellipse between two columns and 0 outside; uneven by ``texture``."""
    inside = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(inside, ((left + right) // 2, HEIGHT // 2), ((right - left) // 2, 60), 0, 0, 360, 1, -1)
    uneven = np.random.default_rng(seed).normal(1, texture, inside.shape) if texture else 1.0
    return inside * np.maximum(uneven, 0.1)


def develop(density: np.ndarray, light: object = (246, 244, 245), noise: float = 1.0) -> np.ndarray:
    rgb = np.asarray(light, float) * 10**-density
    return np.clip(np.rint(rgb + np.random.default_rng(1).normal(0, noise, rgb.shape)), 0, 255).astype(np.uint8)


def dye(thickness: np.ndarray, stain: tuple[float, float, float], amount: float) -> np.ndarray:
    return thickness[..., None] * np.array(stain) * amount


def found_in(path: Path, rgb: np.ndarray, **options: object) -> TissueMask:
    with SlideReader(write_pyramid(path, rgb, 8.0, downsamples=())) as reader:
        return find_tissue(reader, **options)


def agreement(found: np.ndarray, tissue: np.ndarray) -> float:
    return 2 * (found & tissue).sum() / (found.sum() + tissue.sum())


@pytest.mark.parametrize("texture", [0.0, 0.3])
def test_the_pale_half_of_an_immunostained_section_is_tissue(tmp_path: Path, texture: float) -> None:
    pale, positive = piece(20, 130, texture), piece(130, 240, texture)
    density = dye(pale, HAEMATOXYLIN, 0.10) + dye(positive, DAB, 0.6) + dye(positive, HAEMATOXYLIN, 0.1)
    mask = found_in(tmp_path / "ihc.tif", develop(density))
    assert agreement(mask.mask_HW, (pale + positive) > 0) > 0.97
    assert mask.notes == ()


def test_a_thin_spot_within_pale_tissue_is_not_taken_for_glass(tmp_path: Path) -> None:
    thin = np.zeros((HEIGHT, WIDTH), np.float32)
    cv2.circle(thin, (150, 90), 12, 0.85, -1)
    tissue = piece(20, 240, 0.1)
    density = dye(tissue * (1 - cv2.GaussianBlur(thin, (0, 0), 6)), HAEMATOXYLIN, 0.11)
    mask = found_in(tmp_path / "thin.tif", develop(density)).mask_HW
    kept = cv2.dilate((thin > 0).astype(np.uint8), np.ones((25, 25), np.uint8)) == 0
    assert mask[(tissue > 0) & kept].mean() > 0.97


@pytest.mark.parametrize("collagen", [BLUE, GREEN])
@pytest.mark.parametrize("texture", [0.0, 0.3])
def test_the_collagen_of_a_trichrome_is_tissue(
    tmp_path: Path, collagen: tuple[float, float, float], texture: float
) -> None:
    fibrous, muscle = piece(20, 150, texture), piece(150, 240, texture)
    mask = found_in(tmp_path / "trichrome.tif", develop(dye(fibrous, collagen, 0.55) + dye(muscle, RED, 0.5)))
    assert agreement(mask.mask_HW, (fibrous + muscle) > 0) > 0.97
    assert mask.notes == ()


@pytest.mark.parametrize(
    ("stain", "amount"), [(PAS, 0.8), (PAS, 0.1), (EOSIN, 0.08), (HAEMATOXYLIN, 0.12), (BLUE, 0.08), (GREEN, 0.3)]
)
def test_one_stain_alone_is_found(tmp_path: Path, stain: tuple[float, float, float], amount: float) -> None:
    tissue = piece(40, 220, 0.3)
    mask = found_in(tmp_path / "stain.tif", develop(dye(tissue, stain, amount)))
    assert agreement(mask.mask_HW, tissue > 0) > 0.96


def test_silver_is_found_by_its_texture(tmp_path: Path) -> None:
    tissue = piece(40, 220, 0.5)
    mask = found_in(tmp_path / "silver.tif", develop(dye(tissue, SILVER, 0.3)))
    assert agreement(mask.mask_HW, tissue > 0) > 0.95


@pytest.mark.parametrize("light", [(250, 240, 218), (226, 246, 229), (205, 205, 205), (255, 255, 255), (170, 168, 165)])
@pytest.mark.parametrize("amount", [0.8, 0.1])
def test_the_tint_of_the_glass_is_not_stain(tmp_path: Path, light: tuple[int, int, int], amount: float) -> None:
    tissue = piece(40, 220, 0.3)
    mask = found_in(tmp_path / "tinted.tif", develop(dye(tissue, EOSIN, amount), light))
    assert agreement(mask.mask_HW, tissue > 0) > 0.96
    assert not found_in(tmp_path / "glass.tif", develop(dye(tissue, EOSIN, 0.0), light)).mask_HW.any()


@pytest.mark.parametrize("tint", [(246, 244, 245), (250, 238, 215)])
def test_vignetting_is_not_stain(tmp_path: Path, tint: tuple[int, int, int]) -> None:
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    light = (1 - 0.3 * (x**2 + y**2) / 2)[..., None] * np.array(tint)
    pale, positive = piece(20, 130, 0.2), piece(130, 240, 0.2)
    density = dye(pale, HAEMATOXYLIN, 0.12) + dye(positive, DAB, 0.6)
    mask = found_in(tmp_path / "vignette.tif", develop(density, light))
    assert agreement(mask.mask_HW, density.any(axis=2)) > 0.96
    assert not found_in(tmp_path / "glass.tif", develop(0 * density, light)).mask_HW.any()


def test_eosin_that_ran_out_over_the_glass_is_not_tissue(tmp_path: Path) -> None:
    tissue = piece(60, 200, 0.3)
    run = cv2.GaussianBlur((tissue > 0).astype(np.float64), (0, 0), 25)
    mask = found_in(tmp_path / "ran.tif", develop(dye(tissue, EOSIN, 0.6) + dye(run, EOSIN, 0.09)))
    wide = cv2.dilate((tissue > 0).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert mask.mask_HW[tissue > 0].mean() > 0.99
    assert not mask.mask_HW[~wide].any()


def test_dust_shadows_edges_of_coverslips_and_bubbles_are_not_tissue(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = np.zeros((HEIGHT, WIDTH), np.float32)
    for x, y in rng.integers(5, 175, (40, 2)):
        cv2.circle(grey, (int(x), int(y)), int(rng.integers(0, 3)), 0.5, -1)
    cv2.line(grey, (0, 40), (WIDTH, 52), 0.3, 2)
    cv2.line(grey, (200, 0), (204, HEIGHT), 0.3, 2)
    cv2.circle(grey, (120, 110), 30, 0.3, 2)
    shadow = np.zeros_like(grey)
    cv2.circle(shadow, (230, 140), 20, 0.3, -1)
    grey += cv2.GaussianBlur(shadow, (0, 0), 8)
    mask = found_in(tmp_path / "litter.tif", develop(np.repeat(grey[..., None], 3, axis=2)))
    assert not mask.mask_HW.any()
    assert any("shows glass alone" in note for note in mask.notes)


def test_the_edge_of_the_mounting_medium_is_not_tissue(tmp_path: Path) -> None:
    medium = np.zeros((HEIGHT, WIDTH))
    medium[:, :140] = 1.0
    mask = found_in(tmp_path / "medium.tif", develop(dye(medium, (0.0, 0.2, 1.0), 0.02)))
    assert not mask.mask_HW.any()


@pytest.mark.parametrize("stain", [EOSIN, BLUE, DAB, PAS])
def test_a_slide_that_is_all_tissue_is_kept_completely(tmp_path: Path, stain: tuple[float, float, float]) -> None:
    thickness = np.random.default_rng(2).normal(1, 0.2, (HEIGHT, WIDTH)).clip(0.3)
    thickness[:, :100] *= 0.4
    mask = found_in(tmp_path / "full.tif", develop(dye(thickness, stain, 0.5)))
    assert mask.tissue_fraction > 0.99
    assert any("hardly any glass" in note for note in mask.notes)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (2, 3), (5, 5)])
def test_tiny_slides_are_tissue_or_glass_as_a_whole(tmp_path: Path, height: int, width: int) -> None:
    tissue = np.full((height, width, 3), (205, 120, 170))
    assert found_in(tmp_path / "tissue.tif", tissue.astype(np.uint8)).mask_HW.all()
    white = np.full((height, width, 3), (244, 243, 245))
    assert not found_in(tmp_path / "glass.tif", white.astype(np.uint8)).mask_HW.any()


def test_a_slide_of_one_white_says_that_it_is_flat(tmp_path: Path) -> None:
    mask = found_in(tmp_path / "white.tif", np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    assert not mask.mask_HW.any()
    assert any("one flat colour (red, green, blue = 255, 255, 255)" in note for note in mask.notes)


def test_white_where_nothing_was_scanned_is_not_taken_for_the_glass(tmp_path: Path) -> None:
    tissue = piece(60, 140, 0.3)
    rgb = develop(dye(tissue, EOSIN, 0.5), (240, 228, 205))
    rgb[:, 160:] = 255
    mask = found_in(tmp_path / "padded.tif", rgb)
    assert agreement(mask.mask_HW, tissue > 0) > 0.96


def test_texture_that_is_too_pale_is_left_out_with_a_note(tmp_path: Path) -> None:
    tissue = piece(40, 220, 1.0)
    rgb = develop(dye(tissue, (1.0, 1.0, 1.0), 0.03), noise=0.3)
    mask = found_in(tmp_path / "unstained.tif", rgb)
    assert not mask.mask_HW.any()
    assert any("has texture but was left out" in note and "--mask" in note for note in mask.notes)
    assert any("no tissue was found: what there is, is too pale" in note for note in mask.notes)
