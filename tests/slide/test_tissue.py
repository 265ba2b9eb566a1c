from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from slides import GLASS, STAIN, DrawnSlide, make_blank_slide, make_slide, write_pyramid

import maskattn.slide.tissue as tissue_module
from maskattn.errors import SlideError
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tissue import TissueMask, find_tissue, load_mask, saturation_threshold


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> DrawnSlide:
    return make_slide(tmp_path_factory.mktemp("slides") / "drawn.tif", 2048, 1536, spacing_um=1.0)


@pytest.fixture(scope="module")
def info(slide: DrawnSlide) -> SlideInfo:
    return SlideReader(slide.path).info


def at_level_zero(mask: TissueMask, slide: DrawnSlide) -> np.ndarray:
    height, width = slide.tissue_HW.shape
    return cv2.resize(mask.mask_HW.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0


def found_in(path: Path, rgb: np.ndarray, spacing_um: float = 8.0) -> TissueMask:
    return find_tissue(SlideReader(write_pyramid(path, rgb.astype(np.uint8), spacing_um, downsamples=())))


def glass(height: int, width: int) -> np.ndarray:
    return np.clip(np.array(GLASS) + np.random.default_rng(0).integers(-3, 4, (height, width, 3)), 0, 255)


def test_tissue_is_found_where_it_was_drawn(slide: DrawnSlide) -> None:
    mask = find_tissue(SlideReader(slide.path))
    found = at_level_zero(mask, slide)
    overlap = (found & slide.tissue_HW).sum() / (found | slide.tissue_HW).sum()
    assert overlap > 0.97
    assert mask.mask_HW.shape == (192, 256)
    assert mask.px_lv0 == (8.0, 8.0)
    assert mask.spacing_um == pytest.approx(8.0)
    assert mask.method == "saturation"
    assert mask.tissue_fraction == mask.mask_HW.mean()
    assert mask.notes == ()


def test_the_mask_covers_the_slide_exactly_at_any_spacing(slide: DrawnSlide) -> None:
    mask = find_tissue(SlideReader(slide.path), spacing_um=7.3)
    height, width = mask.mask_HW.shape
    assert width * mask.px_lv0[0] == pytest.approx(2048)
    assert height * mask.px_lv0[1] == pytest.approx(1536)
    coarse = find_tissue(SlideReader(slide.path, spacing_um=15.0), spacing_um=8.0)
    assert coarse.px_lv0 == (1.0, 1.0)


@pytest.mark.parametrize("spacing_um", [0.0, -8.0, float("nan"), float("inf")])
def test_an_impossible_spacing_is_refused(slide: DrawnSlide, spacing_um: float) -> None:
    with pytest.raises(ValueError, match="find_tissue needs a spacing above 0"):
        find_tissue(SlideReader(slide.path), spacing_um=spacing_um)


def test_an_all_glass_slide_gives_an_empty_mask_that_says_so(tmp_path: Path) -> None:
    mask = find_tissue(SlideReader(make_blank_slide(tmp_path / "blank.tif")))
    assert not mask.mask_HW.any()
    assert any("no tissue was found" in note for note in mask.notes)


@pytest.mark.parametrize("colour", [(255, 255, 255), (245, 240, 225), (200, 200, 200), (0, 0, 0)])
def test_plain_glass_of_any_tint_is_not_tissue(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    noise = np.random.default_rng(0).integers(-2, 3, (120, 160, 3))
    mask = found_in(tmp_path / "glass.tif", np.clip(np.array(colour) + noise, 0, 255))
    assert not mask.mask_HW.any()


def test_an_all_tissue_slide_keeps_all_of_it(tmp_path: Path) -> None:
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
def test_ink_is_taken_out(tmp_path: Path, ink: tuple[int, int, int]) -> None:
    rgb = glass(200, 300)
    rgb[60:150, 150:270] = STAIN
    rgb[20:180, 40:60] = ink
    path = tmp_path / "ink.tif"
    mask = found_in(path, rgb)
    assert not mask.mask_HW[:, :80].any()
    assert mask.mask_HW[62:148, 152:268].all()
    assert any("ink was taken out" in note for note in mask.notes)
    if min(ink) > 15:
        assert find_tissue(SlideReader(path), reject_ink=False).mask_HW[30:170, 45:55].all()


def test_a_slide_of_one_pixel_of_tissue_view_is_still_tissue(tmp_path: Path) -> None:
    rgb = np.empty((16, 16, 3))
    rgb[:] = STAIN
    mask = found_in(tmp_path / "tiny.tif", rgb, spacing_um=0.5)
    assert mask.mask_HW.tolist() == [[True]]


def test_a_gigantic_view_is_coarsened_and_says_so(slide: DrawnSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue_module, "_MAX_MASK_PX", 10_000)
    mask = find_tissue(SlideReader(slide.path))
    assert mask.mask_HW.size <= 10_100
    assert any("to bound the memory" in note for note in mask.notes)


@given(st.lists(st.integers(0, 10_000), min_size=256, max_size=256))
def test_the_threshold_stays_within_its_bounds(histogram: list[int]) -> None:
    assert 12 <= saturation_threshold(np.array(histogram)) <= 40


def test_the_threshold_of_two_peaks_lies_between_them() -> None:
    histogram = np.zeros(256, int)
    histogram[[4, 5, 6]] = 100
    histogram[[50, 60, 70]] = 100
    assert 6 <= saturation_threshold(histogram) < 50
    assert saturation_threshold(np.zeros(256, int)) == 40


def save(path: Path, plane: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(plane)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("shrink", [1, 4, 7])
def test_a_mask_file_of_any_spacing_is_read(
    tmp_path: Path, info: SlideInfo, slide: DrawnSlide, suffix: str, shrink: int
) -> None:
    plane = slide.tissue_HW[::shrink, ::shrink].astype(np.uint8) * 255
    mask = load_mask(save(tmp_path / f"mask{suffix}", plane), info)
    np.testing.assert_array_equal(mask.mask_HW, plane > 0)
    assert mask.method == "file"
    assert mask.px_lv0 == (2048 / plane.shape[1], 1536 / plane.shape[0])
    assert mask.spacing_um == pytest.approx(shrink, rel=0.01)


def test_label_values_name_the_tissue(tmp_path: Path, info: SlideInfo) -> None:
    plane = np.repeat(np.arange(4, dtype=np.uint8), 64)[None].repeat(192, 0)
    path = save(tmp_path / "labels.png", plane)
    np.testing.assert_array_equal(load_mask(path, info).mask_HW, plane > 0)
    np.testing.assert_array_equal(load_mask(path, info, (2, 3)).mask_HW, plane >= 2)
    missing = load_mask(path, info, (7,))
    assert missing.tissue_fraction == 0
    assert any("none of the tissue values 7; it holds 0, 1, 2, 3" in note for note in missing.notes)


def test_colour_palette_and_one_bit_masks_are_read(tmp_path: Path, info: SlideInfo) -> None:
    plane = np.zeros((192, 256), np.uint8)
    plane[50:100, 60:90] = 2
    colour = np.stack([plane, np.zeros_like(plane), np.zeros_like(plane)], axis=-1)
    palette = Image.fromarray(plane).convert("P")
    palette.putpalette([200, 200, 200] * 256)
    palette.save(tmp_path / "palette.png")
    paths = [
        save(tmp_path / "colour.png", colour),
        tmp_path / "palette.png",
        save(tmp_path / "bits.png", plane > 0),
        save(tmp_path / "sixteen.png", plane.astype(np.uint16) * 1000),
    ]
    for path in paths:
        np.testing.assert_array_equal(load_mask(path, info).mask_HW, plane > 0)


def test_of_a_pyramidal_mask_the_coarsest_level_that_is_fine_enough_is_read(tmp_path: Path, info: SlideInfo) -> None:
    plane = np.zeros((1536, 2048), np.uint8)
    plane[400:800, 400:800] = 1
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as writer:
        for shrink in (1, 2, 4, 8):
            writer.write(plane[::shrink, ::shrink], tile=(256, 256), compression="adobe_deflate", metadata=None)
        writer.write(np.ones((100, 300), np.uint8), metadata=None)  # a label image, not a level
    mask = load_mask(path, info)
    assert mask.mask_HW.shape == (384, 512)  # 4 µm per pixel
    assert mask.mask_HW[100:200, 100:200].all()
    assert mask.mask_HW.sum() == 100 * 100


@pytest.mark.parametrize(
    ("height", "width"), [(192, 256), (191, 256), (193, 256), (1522, 2048), (1, 1), (2, 2), (15, 20)]
)
def test_a_proportion_within_one_percent_or_a_pixel_is_accepted(
    tmp_path: Path, info: SlideInfo, height: int, width: int
) -> None:
    mask = load_mask(save(tmp_path / "mask.png", np.ones((height, width), np.uint8)), info)
    assert mask.px_lv0 == (2048 / width, 1536 / height)


@pytest.mark.parametrize(("height", "width"), [(256, 192), (180, 256), (192, 192), (1536, 2000), (10, 20)])
def test_a_mask_out_of_proportion_is_refused(tmp_path: Path, info: SlideInfo, height: int, width: int) -> None:
    path = save(tmp_path / "mask.png", np.ones((height, width), np.uint8))
    with pytest.raises(SlideError, match=f"got a mask of {width} × {height} px .* slide of 2048 × 1536 px; export"):
        load_mask(path, info)


def test_what_is_no_mask_is_refused_with_its_reason(tmp_path: Path, info: SlideInfo) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 2, (192, 256), np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:400])
    for path, reason in (
        (tmp_path / "missing.png", "which is no file; check the path"),
        (tmp_path, "which is a folder"),
        (text, "an image that Pillow reads"),
        (cut, "an image that Pillow reads"),
    ):
        with pytest.raises(SlideError, match=reason) as raised:
            load_mask(path, info)
        assert str(path) in str(raised.value)


def test_a_mask_too_large_to_decode_is_refused(
    tmp_path: Path, info: SlideInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskattn.slide.mask_file._MAX_PX", 1000)
    path = save(tmp_path / "mask.png", np.ones((192, 256), np.uint8))
    with pytest.raises(SlideError, match=r"up to 1,000 pixels, got 256 × 192 .* coarser spacing"):
        load_mask(path, info)


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
