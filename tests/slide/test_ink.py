"""Pen strokes, drawn at 8 µm per pixel, the resolution at which tissue is searched."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from test_stains import BLUE, EOSIN, GREEN, HAEMATOXYLIN, HEIGHT, WIDTH, develop, dye, found_in, piece

from bench.evidence.tissue_slides import PENS


def stroke(points: list[tuple[int, int]], width: int = 12) -> np.ndarray:
    cover = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.polylines(cover, [np.array(points, np.int32)], False, 255, width)
    return cv2.GaussianBlur(cover, (0, 0), 0.7) / 255


def ink(cover: np.ndarray, pen: str) -> np.ndarray:
    return cover[..., None] * -np.log10((np.array(PENS[pen]) + 1) / 247)


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("width", [4, 12])
def test_a_stroke_on_glass_is_removed(tmp_path: Path, pen: str, width: int) -> None:
    tissue, cover = piece(120, 250, 0.3), stroke([(20, 10), (50, 60), (40, 120), (80, 170)], width)
    density = dye(tissue, EOSIN, 0.5) + dye(tissue, HAEMATOXYLIN, 0.2) + ink(cover, pen)
    mask = found_in(tmp_path / "ink.tif", develop(density))
    assert not mask.mask_HW[:, :110].any()
    assert mask.mask_HW[tissue > 0].mean() > 0.99
    (note,) = mask.notes
    assert note.startswith("ink was taken out: ")
    assert "--ink off" in note
    kept = found_in(tmp_path / "kept.tif", develop(density), ink="off")
    if pen != "black":  # black has no colour, so that on glass it is no stain either
        assert kept.mask_HW[cover == 1].all()
    assert kept.notes == ()


@pytest.mark.parametrize("pen", PENS)
def test_a_stroke_across_tissue_is_removed_where_it_lies_on_glass(tmp_path: Path, pen: str) -> None:
    tissue, cover = piece(120, 250, 0.3), stroke([(10, 60), (90, 80), (180, 90)])
    mask = found_in(tmp_path / "ink.tif", develop(dye(tissue, EOSIN, 0.5) + ink(cover, pen)))
    assert not mask.mask_HW[:, :110].any()
    away = cv2.dilate((cover > 0).astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
    assert mask.mask_HW[(tissue > 0) & away].mean() > 0.99


@pytest.mark.parametrize("pen", ["blue", "black"])
def test_a_ring_drawn_around_tissue_is_removed_and_the_tissue_in_it_stays(tmp_path: Path, pen: str) -> None:
    tissue, cover = piece(90, 170, 0.3), np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(cover, (130, 90), (100, 82), 0, 0, 360, 255, 8)
    mask = found_in(tmp_path / "ring.tif", develop(dye(tissue, EOSIN, 0.5) + ink(cover / 255, pen)))
    assert not mask.mask_HW[cover > 0].any()
    assert mask.mask_HW[tissue > 0].mean() > 0.99


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("radius", [6, 40])
def test_a_blot_on_glass_is_removed(tmp_path: Path, pen: str, radius: int) -> None:
    tissue, cover = piece(130, 250, 0.3), np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(cover, (60, 90), radius, 255, -1)
    cover = cv2.GaussianBlur(cover, (0, 0), 0.7)
    mask = found_in(tmp_path / "blot.tif", develop(dye(tissue, EOSIN, 0.5) + ink(cover / 255, pen)))
    assert not mask.mask_HW[:, :120].any()
    assert mask.mask_HW[tissue > 0].mean() > 0.99
    assert "ink was taken out" in mask.notes[0]


@pytest.mark.parametrize(("pen", "stain"), [("blue", BLUE), ("green", GREEN)])
def test_a_stroke_next_to_tissue_of_its_own_colour_is_removed(
    tmp_path: Path, pen: str, stain: tuple[float, float, float]
) -> None:
    tissue, cover = piece(120, 250, 0.3), stroke([(20, 10), (50, 60), (40, 120), (80, 170)])
    mask = found_in(tmp_path / "both.tif", develop(dye(tissue, stain, 0.6) + ink(cover, pen)))
    assert not mask.mask_HW[:, :110].any()
    assert mask.mask_HW[tissue > 0].mean() > 0.99


@pytest.mark.parametrize("stain", [BLUE, GREEN, HAEMATOXYLIN])
def test_a_core_of_tissue_as_narrow_as_a_stroke_is_recognised_by_its_texture(
    tmp_path: Path, stain: tuple[float, float, float]
) -> None:
    core = stroke([(20, 30), (120, 90), (240, 140)])
    texture = np.random.default_rng(3).normal(1, 0.35, core.shape).clip(0.2)
    mask = found_in(tmp_path / "core.tif", develop(dye(core * texture, stain, 0.7)))
    assert mask.mask_HW[core == 1].mean() > 0.98
    assert mask.notes == ()


def test_black_pigment_within_tissue_is_no_ink(tmp_path: Path) -> None:
    tissue = piece(40, 220, 0.3)
    pigment = np.zeros((HEIGHT, WIDTH))
    pigment[70:100, 90:170] = 1
    mask = found_in(tmp_path / "pigment.tif", develop(dye(tissue, EOSIN, 0.5) + dye(pigment, (1, 1, 1), 1.2)))
    assert mask.mask_HW[pigment > 0].all()
    assert mask.notes == ()


def test_a_small_stroke_on_a_small_slide_is_removed(tmp_path: Path) -> None:
    rgb = np.full((50, 70, 3), 244, np.uint8)
    rgb[5:45, 40:47] = PENS["blue"]
    mask = found_in(tmp_path / "small.tif", rgb)
    assert not mask.mask_HW.any()


def test_a_slide_of_glass_and_ink_says_so(tmp_path: Path) -> None:
    mask = found_in(tmp_path / "ink.tif", develop(ink(stroke([(20, 20), (200, 150)]), "green")))
    assert not mask.mask_HW.any()
    assert any("no tissue was found: the slide holds glass and ink alone" in note for note in mask.notes)


def test_an_unknown_rule_for_ink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='ink="auto" or ink="off", got ink=\'no\''):
        found_in(tmp_path / "a.tif", develop(np.zeros((HEIGHT, WIDTH, 3))), ink="no")
