from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import cv2
import numpy as np
import pytest
from slides import DrawnSlide, damage_tile, draw_tissue, make_slide, write_pyramid

import maskattn.slide.reader as reader_module
from maskattn.errors import SlideError
from maskattn.slide.reader import SlideReader
from maskattn.slide.resampling import on_white


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> DrawnSlide:
    return make_slide(tmp_path_factory.mktemp("slides") / "drawn.tif", 1024, 768, downsamples=(2, 8))


def wave(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Mean of a sine of 64 px over [start, end): a picture whose value tells the place, 10 grey values per pixel."""
    turn = 2 * np.pi / 64
    return 128 + 100 * (np.cos(start * turn) - np.cos(end * turn)) / (turn * (end - start))


def test_info_gives_the_geometry_and_the_spacing(slide: DrawnSlide) -> None:
    with SlideReader(slide.path) as reader:
        info = reader.info
    assert (info.width_px, info.height_px) == (1024, 768)
    assert info.level_dimensions == ((1024, 768), (512, 384), (128, 96))
    assert info.level_downsamples == ((1.0, 1.0), (2.0, 2.0), (8.0, 8.0))
    assert info.spacing_um == pytest.approx(0.5)
    assert info.spacing_source == "metadata"
    assert info.vendor == "generic-tiff"
    with pytest.raises(FrozenInstanceError):
        info.width_px = 3


def test_level_zero_is_read_pixel_for_pixel(slide: DrawnSlide) -> None:
    region = SlideReader(slide.path).read_region(130, 77, (301, 203), (301, 203))
    np.testing.assert_array_equal(region, slide.rgb_HW3[77:280, 130:431])


def test_a_shrunk_region_is_the_area_mean(tmp_path: Path) -> None:
    rgb, _ = draw_tissue(512, 512)
    reader = SlideReader(write_pyramid(tmp_path / "s.tif", rgb, downsamples=()))
    region = reader.read_region(64, 32, (384, 384), (128, 128))
    mean = rgb[32:416, 64:448].reshape(128, 3, 128, 3, 3).mean(axis=(1, 3))
    assert np.abs(region - mean).max() <= 0.51


@pytest.mark.parametrize(("out", "level"), [(1024, 0), (600, 0), (512, 1), (509, 1), (200, 1), (128, 2), (30, 2)])
def test_the_level_that_needs_the_least_shrinking_is_read(slide: DrawnSlide, out: int, level: int) -> None:
    assert SlideReader(slide.path)._level_for(1024 / out, 1024 / out) == level


@pytest.mark.parametrize("downsamples", [(), (4,)])
@pytest.mark.parametrize(("x", "y", "side"), [(0, 0, 514), (257, 514, 257), (3, 5, 257), (101, 262, 513)])
def test_geometry_holds_at_sub_pixel_positions_of_a_level(
    tmp_path: Path, downsamples: tuple[int, ...], x: int, y: int, side: int
) -> None:
    # An offset by half a pixel of the level, 2 px, would be 20 grey values.
    pixels = np.arange(1024)
    along = wave(pixels, pixels + 1)
    rgb = np.rint(np.stack(np.broadcast_arrays(along[None], along[:, None], 128), axis=-1)).astype(np.uint8)
    reader = SlideReader(write_pyramid(tmp_path / "s.tif", rgb, downsamples=downsamples))
    region = reader.read_region(x, y, (side, side), (64, 64)).astype(float)
    edges = np.arange(65) * side / 64
    assert np.abs(region[..., 0] - wave(x + edges[:-1], x + edges[1:])).max() < 4
    assert np.abs(region[..., 1] - wave(y + edges[:-1], y + edges[1:])[:, None]).max() < 4


def test_pixels_outside_the_slide_are_white(slide: DrawnSlide) -> None:
    reader = SlideReader(slide.path)
    region = reader.read_region(-50, 700, (150, 150), (150, 150))
    np.testing.assert_array_equal(region[:68, 50:], slide.rgb_HW3[700:, :100])
    assert (region[68:] == 255).all()
    assert (region[:, :50] == 255).all()
    assert (reader.read_region(5000, 5000, (64, 64), (32, 32)) == 255).all()


def test_transparent_pixels_lie_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 100, 255, 51)
    rgb = on_white(rgba)
    assert rgb[0, 0].tolist() == [10, 20, 30]
    assert rgb[0, 1].tolist() == [255, 255, 255]
    assert rgb[1, 0].tolist() == [204, 224, 255]


def test_reading_in_blocks_changes_nothing(slide: DrawnSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SlideReader(slide.path)
    asked = [((-64, -64), (1152, 896), (288, 224)), ((0, 0), (1024, 768), (1024, 768)), ((8, 16), (960, 640), (6, 4))]
    whole = [reader.read_region(*corner, size, out) for corner, size, out in asked]
    monkeypatch.setattr(reader_module, "_BLOCK_PX", 128 * 128)
    for (corner, size, out), expected in zip(asked, whole, strict=True):
        blocks = reader.read_region(*corner, size, out)
        assert np.abs(blocks.astype(int) - expected).max() <= 1


def test_a_view_that_took_much_decoding_serves_smaller_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_DEAR_SOURCE_PX", 1 << 18)
    slide = make_slide(tmp_path / "s.tif", 1024, 768, downsamples=())
    expected = SlideReader(slide.path).thumbnail(256)
    reader = SlideReader(slide.path)
    reader.thumbnail(512)
    for tile in range(12):
        damage_tile(slide.path, tile)  # level 0 can no longer be read
    reader.close()
    assert np.abs(reader.thumbnail(256).astype(int) - expected).max() <= 1
    with pytest.raises(SlideError, match="a region must decode"):
        reader.thumbnail(513)
    with pytest.raises(SlideError, match="a region must decode"):
        pickle.loads(pickle.dumps(reader)).thumbnail(256)


def test_a_view_that_would_decode_for_hours_is_refused_with_its_remedy(
    slide: DrawnSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MOST_SOURCE_PX", 400_000)
    assert SlideReader(slide.path).thumbnail(128).shape == (96, 128, 3)  # from the coarse level
    one_level = SlideReader(make_slide(tmp_path / "s.tif", 1024, 768, downsamples=()).path)
    with pytest.raises(
        SlideError, match=r"must have coarse levels .* got 1024 × 768 px .*; convert it to a tiled pyramid"
    ):
        one_level.thumbnail(128)
    assert one_level.read_region(0, 0, (600, 600), (60, 60)).shape == (60, 60, 3)


def test_thumbnail_keeps_the_proportion_and_never_enlarges(slide: DrawnSlide) -> None:
    reader = SlideReader(slide.path)
    assert reader.thumbnail(200).shape == (150, 200, 3)
    assert reader.thumbnail(1).shape == (1, 1, 3)
    np.testing.assert_array_equal(reader.thumbnail(10_000), slide.rgb_HW3)
    expected = cv2.resize(slide.rgb_HW3, (128, 96), interpolation=cv2.INTER_AREA)
    assert np.abs(reader.thumbnail(128).astype(int) - expected).max() <= 1
    with pytest.raises(ValueError, match="max_px=0"):
        reader.thumbnail(0)


def test_sizes_below_one_are_refused(slide: DrawnSlide) -> None:
    with pytest.raises(ValueError, match=r"size_lv0=\(0, 5\)"):
        SlideReader(slide.path).read_region(0, 0, (0, 5), (1, 1))


def test_a_pickled_reader_reads_the_same(slide: DrawnSlide) -> None:
    reader = SlideReader(slide.path, spacing_um=0.25)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.info == reader.info
    np.testing.assert_array_equal(
        copy.read_region(9, 9, (64, 64), (64, 64)), reader.read_region(9, 9, (64, 64), (64, 64))
    )


def test_the_reader_opens_again_after_close_and_after_an_error(tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "s.tif", 768, 512, downsamples=())
    damage_tile(slide.path, 0)
    with SlideReader(slide.path) as reader:
        for _ in range(2):
            with pytest.raises(SlideError, match="a region must decode, got x=0, y=0 at level 0 of"):
                reader.read_region(0, 0, (64, 64), (64, 64))
            readable = reader.read_region(300, 300, (64, 64), (64, 64))
            np.testing.assert_array_equal(readable, slide.rgb_HW3[300:364, 300:364])
    np.testing.assert_array_equal(reader.read_region(300, 300, (8, 8), (8, 8)), slide.rgb_HW3[300:308, 300:308])


def test_an_override_outranks_the_metadata(slide: DrawnSlide) -> None:
    assert SlideReader(slide.path, 0.25).info.spacing_um == 0.25
    assert SlideReader(slide.path, 0.25).info.spacing_source == "override"
    assert SlideReader(slide.path, 0.25, "manifest").info.spacing_source == "manifest"


@pytest.mark.parametrize("given", [0.0, -1.0, 0.049, 20.1, float("nan"), float("inf")])
def test_an_implausible_override_is_refused(slide: DrawnSlide, given: float) -> None:
    with pytest.raises(SlideError, match=r"0.05 to 20 µm per pixel, got .* from the override"):
        _ = SlideReader(slide.path, given).info


@pytest.mark.parametrize("spacing_um", [None, 264.58, 0.01])
def test_a_slide_without_plausible_spacing_says_how_to_give_it(tmp_path: Path, spacing_um: float | None) -> None:
    slide = make_slide(tmp_path / "s.tif", 64, 64, spacing_um, downsamples=())
    reader = SlideReader(slide.path)
    remedy = r"give the slide's own spacing with `--spacing-um`" if spacing_um == 0.01 else r"--spacing-um 0\.5"
    with pytest.raises(SlideError, match=remedy + ".*spacing_um column") as raised:
        _ = reader.info
    assert "got none" in str(raised.value) if spacing_um is None else f"{spacing_um:.4g}"[:3] in str(raised.value)
    assert reader.describe()["spacing"].startswith("unknown: ")
    assert SlideReader(slide.path, 0.5).info.spacing_um == 0.5


def test_anisotropic_spacing_is_refused_above_five_percent_and_averaged_below(tmp_path: Path) -> None:
    skewed = make_slide(tmp_path / "skewed.tif", 64, 64, (0.5, 0.55), downsamples=())
    with pytest.raises(SlideError, match=r"same in x and y within 5 %, got .* 0.5, 0.55"):
        _ = SlideReader(skewed.path).info
    nearly = make_slide(tmp_path / "nearly.tif", 64, 64, (0.5, 0.51), downsamples=())
    assert SlideReader(nearly.path).info.spacing_um == pytest.approx(0.505)


def test_describe_says_what_the_file_says(slide: DrawnSlide) -> None:
    said = SlideReader(slide.path).describe()
    assert said["size"] == "1024 × 768 px"
    assert said["spacing"] == "0.5 µm per level-0 pixel (from metadata)"
    assert said["extent"] == "0.51 × 0.38 mm"
    assert len(said["levels"]) == 3
    assert said["properties"]["openslide.vendor"] == "generic-tiff"


def test_files_that_are_not_slides_are_refused_with_the_reason(tmp_path: Path) -> None:
    text = tmp_path / "text.svs"
    text.write_text("not a slide")
    empty = tmp_path / "empty.svs"
    empty.touch()
    for path, reason in (
        (tmp_path / "missing.svs", "which is no file; check the path"),
        (tmp_path, "which is a folder"),
        (text, "which is a text file that begins with 'not a slide'"),
        (empty, r"which is an empty file \(0 bytes\); copy it again"),
    ):
        with pytest.raises(SlideError, match=reason) as raised:
            SlideReader(path)
        assert str(path) in str(raised.value)


def test_real_slide(shared_slides: Path) -> None:
    with SlideReader(shared_slides / "CMU-1-Small-Region.svs") as reader:
        info = reader.info
        assert (info.width_px, info.height_px, info.spacing_um) == (2220, 2967, 0.499)
        assert (info.vendor, info.objective_power) == ("aperio", 20.0)
        assert reader.describe()["associated images"] == ["label", "macro", "thumbnail"]
        thumbnail = reader.thumbnail(300)
    assert thumbnail.shape == (300, 224, 3)
    assert thumbnail[150, 20].min() > 230  # glass
    assert thumbnail[250, 100].min() < 200  # tissue


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("histolab_broken.svs", "a text file that begins with"),
        ("openslide_unopenable.tiff", "Unsupported TIFF compression"),
    ],
)
def test_real_files_that_do_not_open(shared_slides: Path, name: str, reason: str) -> None:
    with pytest.raises(SlideError, match=reason):
        SlideReader(shared_slides / name)


def test_real_file_that_opens_but_does_not_decode(shared_slides: Path) -> None:
    reader = SlideReader(shared_slides / "openslide_unreadable.svs")
    for _ in range(2):
        with pytest.raises(SlideError, match="Bogus marker length"):
            reader.read_region(0, 0, (16, 16), (16, 16))
