from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slides import GLASS, STAIN, DrawnSlide, make_blank_slide, write_pyramid

import maskattn.slide.tissue.view as view_module
from maskattn.errors import SlideError
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import TissueMask, find_tissue
from maskattn.slide.tissue.stain import stain_threshold


def at_level_zero(mask: TissueMask, drawn: DrawnSlide) -> np.ndarray:
    height, width = drawn.tissue_HW.shape
    return cv2.resize(mask.mask_HW.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0


def found_in(path: Path, rgb: np.ndarray, spacing_um: float = 8.0) -> TissueMask:
    return find_tissue(SlideReader(write_pyramid(path, rgb.astype(np.uint8), spacing_um, downsamples=())))


def glass(height: int, width: int) -> np.ndarray:
    return np.clip(np.array(GLASS) + np.random.default_rng(0).integers(-3, 4, (height, width, 3)), 0, 255)


def test_tissue_is_found_where_it_was_drawn(drawn: DrawnSlide) -> None:
    mask = find_tissue(SlideReader(drawn.path))
    found = at_level_zero(mask, drawn)
    overlap = (found & drawn.tissue_HW).sum() / (found | drawn.tissue_HW).sum()
    assert overlap > 0.97
    assert mask.mask_HW.shape == (192, 256)
    assert mask.px_lv0 == (8.0, 8.0)
    assert mask.spacing_um == pytest.approx(8.0)
    assert mask.method == "optical density"
    assert mask.tissue_fraction == mask.mask_HW.mean()
    assert mask.notes == ()


def test_the_mask_covers_the_slide_exactly_at_any_spacing(drawn: DrawnSlide) -> None:
    mask = find_tissue(SlideReader(drawn.path), spacing_um=7.3)
    height, width = mask.mask_HW.shape
    assert width * mask.px_lv0[0] == pytest.approx(2048)
    assert height * mask.px_lv0[1] == pytest.approx(1536)
    coarse = find_tissue(SlideReader(drawn.path, spacing_um=15.0), spacing_um=8.0)
    assert coarse.px_lv0 == (1.0, 1.0)


@pytest.mark.parametrize("spacing_um", [0.0, -8.0, float("nan"), float("inf")])
def test_an_impossible_spacing_is_refused(drawn: DrawnSlide, spacing_um: float) -> None:
    with pytest.raises(ValueError, match="find_tissue needs a spacing above 0"):
        find_tissue(SlideReader(drawn.path), spacing_um=spacing_um)


def test_an_all_glass_slide_gives_an_empty_mask_that_says_so(tmp_path: Path) -> None:
    mask = find_tissue(SlideReader(make_blank_slide(tmp_path / "blank.tif")))
    assert not mask.mask_HW.any()
    assert any("no tissue was found" in note for note in mask.notes)


@pytest.mark.parametrize("colour", [(255, 255, 255), (245, 240, 225), (200, 200, 200)])
def test_plain_glass_of_any_tint_is_not_tissue(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    noise = np.random.default_rng(0).integers(-2, 3, (120, 160, 3))
    mask = found_in(tmp_path / "glass.tif", np.clip(np.array(colour) + noise, 0, 255))
    assert not mask.mask_HW.any()


def test_an_all_tissue_slide_is_kept_completely(tmp_path: Path) -> None:
    # Pale stroma and dark sheets of nuclei: Otsu alone would throw the stroma away.
    rgb = np.empty((128, 160, 3))
    rgb[:] = (225, 180, 205)
    rgb[:, 80:] = (120, 60, 140)
    mask = found_in(tmp_path / "full.tif", rgb + np.random.default_rng(0).integers(-5, 6, rgb.shape))
    assert mask.mask_HW.all()
    assert any("hardly any glass" in note for note in mask.notes)


def test_pale_tissue_on_glass_is_found(tmp_path: Path) -> None:
    rgb = glass(150, 200)
    rgb[50:100, 60:140] -= (8, 34, 18)
    mask = found_in(tmp_path / "pale.tif", rgb)
    assert mask.mask_HW[52:98, 62:138].all()
    assert mask.tissue_fraction < 0.16


def test_dust_is_dropped_and_small_holes_are_filled_by_area(tmp_path: Path) -> None:
    rgb = glass(200, 200)
    rgb[40:160, 40:160] = STAIN
    rgb[10:16, 10:16] = STAIN  # 48 µm across: dust
    rgb[60:70, 60:70] = GLASS  # 80 µm: a small hole
    rgb[90:130, 90:130] = GLASS  # 320 µm: a hole
    path = tmp_path / "dust.tif"
    mask = found_in(path, rgb).mask_HW
    assert not mask[:30, :30].any()
    assert mask[60:70, 60:70].all()
    assert not mask[95:125, 95:125].any()
    reader = SlideReader(path)
    assert find_tissue(reader, min_tissue_um2=0.0).mask_HW[10:16, 10:16].any()
    assert find_tissue(reader, max_hole_um2=1e6).mask_HW[95:125, 95:125].all()
    assert not find_tissue(reader, max_hole_um2=0.0).mask_HW[63:67, 63:67].any()


@pytest.mark.parametrize("ink", [(20, 120, 60), (30, 70, 190), (15, 15, 18)])
def test_ink_is_removed(tmp_path: Path, ink: tuple[int, int, int]) -> None:
    rgb = glass(200, 300)
    rgb[60:150, 150:270] = STAIN
    rgb[20:180, 40:60] = ink
    path = tmp_path / "ink.tif"
    mask = found_in(path, rgb)
    assert not mask.mask_HW[:, :80].any()
    assert mask.mask_HW[62:148, 152:268].all()
    assert any("ink was taken out" in note for note in mask.notes)
    if min(ink) > 15:
        assert find_tissue(SlideReader(path), ink="off").mask_HW[30:170, 45:55].all()


def test_a_slide_of_one_pixel_of_tissue_view_is_still_tissue(tmp_path: Path) -> None:
    rgb = np.empty((16, 16, 3))
    rgb[:] = STAIN
    mask = found_in(tmp_path / "tiny.tif", rgb, spacing_um=0.5)
    assert mask.mask_HW.tolist() == [[True]]


def test_a_gigantic_slide_is_viewed_more_coarsely_with_a_note(
    drawn: DrawnSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "_MAX_VIEW_PX", 10_000)
    mask = find_tissue(SlideReader(drawn.path))
    assert mask.mask_HW.size <= 10_100
    assert any("to bound the memory" in note for note in mask.notes)


@given(st.lists(st.integers(0, 10_000), min_size=256, max_size=256))
def test_the_threshold_stays_within_its_bounds(histogram: list[int]) -> None:
    assert 7 <= stain_threshold(np.array(histogram)) <= 25


def test_the_threshold_of_two_peaks_lies_between_them() -> None:
    histogram = np.zeros(256, int)
    histogram[[1, 2, 3]] = 100
    histogram[[20, 30, 40]] = 100
    assert 7 <= stain_threshold(histogram) < 20
    assert stain_threshold(np.zeros(256, int)) == 25


def test_the_tissue_of_a_real_slide_is_found(shared_slides: Path) -> None:
    reader = SlideReader(shared_slides / "CMU-1-Small-Region.svs")
    mask = find_tissue(reader)
    assert 0.3 < mask.tissue_fraction < 0.4
    height, width = mask.mask_HW.shape
    assert mask.mask_HW[int(height * 0.8), int(width * 0.5)]  # dermis
    assert mask.mask_HW[int(height * 0.36), int(width * 0.25)]  # a thin strand
    assert not mask.mask_HW[: height // 4, : width // 4].any()  # glass
    assert not mask.mask_HW[height // 2 :, : width // 6].any()


def test_real_files_smaller_than_a_mask_pixel(shared_slides: Path) -> None:
    assert find_tissue(SlideReader(shared_slides / "openslide_small.svs")).mask_HW.shape == (1, 1)
    with pytest.raises(SlideError, match="Bogus marker length"):
        find_tissue(SlideReader(shared_slides / "openslide_unreadable.svs"))
