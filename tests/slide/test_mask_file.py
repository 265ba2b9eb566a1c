from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from slides import DrawnSlide

from maskattn.errors import SlideError
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tissue import load_mask


def save(path: Path, plane: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(plane)
    (image.convert(mode) if mode else image).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("shrink", [1, 4, 7])
def test_a_mask_file_of_any_spacing_is_read(
    tmp_path: Path, drawn_info: SlideInfo, drawn: DrawnSlide, suffix: str, shrink: int
) -> None:
    plane = drawn.tissue_HW[::shrink, ::shrink].astype(np.uint8) * 255
    mask = load_mask(save(tmp_path / f"mask{suffix}", plane), drawn_info)
    np.testing.assert_array_equal(mask.mask_HW, plane > 0)
    assert mask.method == "file"
    assert mask.px_lv0 == (2048 / plane.shape[1], 1536 / plane.shape[0])
    assert mask.spacing_um == pytest.approx(shrink, rel=0.01)


def test_label_values_name_the_tissue(tmp_path: Path, drawn_info: SlideInfo) -> None:
    plane = np.repeat(np.arange(4, dtype=np.uint8), 64)[None].repeat(192, 0)
    path = save(tmp_path / "labels.png", plane)
    np.testing.assert_array_equal(load_mask(path, drawn_info).mask_HW, plane > 0)
    np.testing.assert_array_equal(load_mask(path, drawn_info, (2, 3)).mask_HW, plane >= 2)
    missing = load_mask(path, drawn_info, (7,))
    assert missing.tissue_fraction == 0
    assert any("none of the tissue values 7; it holds 0, 1, 2, 3" in note for note in missing.notes)


def test_colour_palette_and_one_bit_masks_are_read(tmp_path: Path, drawn_info: SlideInfo) -> None:
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
        np.testing.assert_array_equal(load_mask(path, drawn_info).mask_HW, plane > 0)


def test_the_coarsest_level_of_a_pyramidal_mask_that_is_fine_enough_is_read(
    tmp_path: Path, drawn_info: SlideInfo
) -> None:
    plane = np.zeros((1536, 2048), np.uint8)
    plane[400:800, 400:800] = 1
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as writer:
        for shrink in (1, 2, 4, 8):
            writer.write(plane[::shrink, ::shrink], tile=(256, 256), compression="adobe_deflate", metadata=None)
        writer.write(np.ones((100, 300), np.uint8), metadata=None)  # a label image, not a level
    mask = load_mask(path, drawn_info)
    assert mask.mask_HW.shape == (384, 512)  # 4 µm per pixel
    assert mask.mask_HW[100:200, 100:200].all()
    assert mask.mask_HW.sum() == 100 * 100


@pytest.mark.parametrize(
    ("height", "width"), [(192, 256), (191, 256), (193, 256), (1522, 2048), (1, 1), (2, 2), (15, 20)]
)
def test_a_proportion_within_one_percent_or_a_pixel_is_accepted(
    tmp_path: Path, drawn_info: SlideInfo, height: int, width: int
) -> None:
    mask = load_mask(save(tmp_path / "mask.png", np.ones((height, width), np.uint8)), drawn_info)
    assert mask.px_lv0 == (2048 / width, 1536 / height)


@pytest.mark.parametrize(("height", "width"), [(256, 192), (180, 256), (192, 192), (1536, 2000), (10, 20)])
def test_a_mask_out_of_proportion_is_refused(tmp_path: Path, drawn_info: SlideInfo, height: int, width: int) -> None:
    path = save(tmp_path / "mask.png", np.ones((height, width), np.uint8))
    with pytest.raises(SlideError, match=f"got a mask of {width} × {height} px .* slide of 2048 × 1536 px; export"):
        load_mask(path, drawn_info)


def test_files_that_are_not_masks_are_refused_with_the_reason(tmp_path: Path, drawn_info: SlideInfo) -> None:
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
            load_mask(path, drawn_info)
        assert str(path) in str(raised.value)


def test_a_mask_too_large_to_decode_is_refused(
    tmp_path: Path, drawn_info: SlideInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskattn.mask_images.decoding._MAX_PX", 1000)
    path = save(tmp_path / "mask.png", np.ones((192, 256), np.uint8))
    with pytest.raises(SlideError, match=r"up to 1,000 pixels, got 256 × 192 .* coarser spacing"):
        load_mask(path, drawn_info)


def test_a_mask_without_tissue_is_called_that_and_not_a_pale_slide(tmp_path: Path, drawn_info: SlideInfo) -> None:
    path = save(tmp_path / "empty.png", np.zeros((192, 256), np.uint8))
    notes = load_mask(path, drawn_info).notes
    assert notes == (f"the mask file {path} holds no tissue",)


def test_a_mask_of_glass_on_a_stained_slide_is_noted_as_inverted(tmp_path: Path, drawn: DrawnSlide) -> None:
    reader = SlideReader(drawn.path)
    right = drawn.tissue_HW[::8, ::8]
    for plane, inverted in ((~right, True), (right, False), (np.ones_like(right), False)):
        mask = load_mask(save(tmp_path / "mask.png", plane), reader.info, reader=reader)
        assert any("looks inverted" in note for note in mask.notes) == inverted
        np.testing.assert_array_equal(mask.mask_HW, plane)
    half = right.copy()
    half[:, 128:] = False  # the user's choice of one piece, the other stained and left out
    assert load_mask(save(tmp_path / "half.png", half), reader.info, reader=reader).notes == ()


def test_the_inverted_mask_can_be_turned_by_its_value(tmp_path: Path, drawn_info: SlideInfo) -> None:
    plane = np.zeros((192, 256), np.uint8)
    plane[50:100, 60:90] = 255
    for name in ("m.png", "m.jpg"):
        np.testing.assert_array_equal(load_mask(save(tmp_path / name, plane), drawn_info, (0,)).mask_HW, plane == 0)


def test_a_coarse_level_of_a_pyramid_in_sub_ifds_is_read(tmp_path: Path, drawn_info: SlideInfo) -> None:
    plane = np.zeros((1536, 2048), np.uint16)
    plane[400:800, 400:800] = 300
    path = tmp_path / "pyramid.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(plane, tile=(256, 256), subifds=2, compression="adobe_deflate", metadata={"axes": "YX"})
        for shrink in (2, 4):
            writer.write(plane[::shrink, ::shrink], tile=(256, 256), subfiletype=1, compression="adobe_deflate")
    mask = load_mask(path, drawn_info, (300,))
    assert mask.mask_HW.shape == (384, 512)
    assert mask.mask_HW.sum() == 100 * 100
    assert mask.notes == ()


def test_outlines_and_other_files_that_are_no_images_are_named(tmp_path: Path, drawn_info: SlideInfo) -> None:
    (tmp_path / "asap.xml").write_text("<?xml version='1.0'?><ASAP/>")
    with pytest.raises(SlideError, match=r"outlines .* are not read; draw them into an image"):
        load_mask(tmp_path / "asap.xml", drawn_info)
    np.savez(tmp_path / "mask.npz", mask=np.ones((192, 256)))
    (tmp_path / "empty.png").touch()
    for name in ("mask.npz", "empty.png"):
        with pytest.raises(SlideError, match="must be an image that Pillow reads"):
            load_mask(tmp_path / name, drawn_info)
