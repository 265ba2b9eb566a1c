"""What masks say: (192, 256) planes with a disc of tissue, saved in every kind of file and read back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from maskattn.errors import SlideError
from maskattn.mask_images import decoding
from maskattn.mask_images.decoding import coarsest_level, read_mask_image
from maskattn.mask_images.meaning import tissue_of

SHAPE = (192, 256)


def read(path: Path, values: tuple[int, ...] | None = None) -> tuple[np.ndarray, list[str]]:
    return tissue_of(read_mask_image(path, lambda _: True), path.name, values)


@pytest.fixture
def disc() -> np.ndarray:
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return (rows - 90) ** 2 + (columns - 120) ** 2 < 60**2


def in_colours(disc: np.ndarray, inside: tuple[int, ...], outside: tuple[int, ...]) -> np.ndarray:
    return np.where(disc[..., None], np.array(inside), np.array(outside)).astype(np.uint8)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ((0, 200, 0), (0, 0, 0)),
        ((0, 0, 1), (0, 0, 0)),
        ((255, 255, 255, 255), (255, 255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0, 0)),
        ((10, 200, 30, 128), (255, 255, 255, 0)),
        ((0, 0, 255, 255), (0, 0, 0, 255)),
        ((0, 0, 255, 128), (0, 0, 0, 128)),
    ],
)
def test_colour_against_black_or_alpha_tells(
    tmp_path: Path, disc: np.ndarray, inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    for suffix in (".png", ".tif"):
        path = tmp_path / f"mask{suffix}"
        Image.fromarray(in_colours(disc, inside, outside)).save(path)
        mask, notes = read(path)
        np.testing.assert_array_equal(mask, disc)
        assert notes == []


def test_grey_with_alpha_and_a_transparent_grey_tell_likewise(tmp_path: Path, disc: np.ndarray) -> None:
    grey = np.full(SHAPE, 255, np.uint8)
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(disc.astype(np.uint8) * 255)]).save(tmp_path / "la.png")
    Image.fromarray(np.where(disc, 255, 7).astype(np.uint8)).save(tmp_path / "trns.png", transparency=7)
    Image.fromarray(in_colours(disc, (9, 9, 9), (200, 0, 0))).save(tmp_path / "rgb.png", transparency=(200, 0, 0))
    for name in ("la.png", "trns.png", "rgb.png"):
        np.testing.assert_array_equal(read(tmp_path / name)[0], disc)


def test_transparent_and_black_areas_are_both_background_and_that_is_noted(tmp_path: Path, disc: np.ndarray) -> None:
    rgba = in_colours(disc, (255, 255, 255, 255), (0, 0, 0, 255))
    rgba[:, :40] = (0, 0, 0, 0)
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    mask, notes = read(tmp_path / "mask.png")
    np.testing.assert_array_equal(mask, disc)
    assert notes == ["the mask has transparent and black areas; both count as background"]


def test_an_entirely_transparent_mask_holds_nothing(tmp_path: Path, disc: np.ndarray) -> None:
    Image.fromarray(in_colours(disc, (255, 255, 255, 0), (0, 0, 0, 0))).save(tmp_path / "mask.png")
    mask, notes = read(tmp_path / "mask.png")
    assert not mask.any()
    assert notes == ["every pixel of the mask is transparent"]


def palette_mask(path: Path, indices: np.ndarray, colours: list[int], **options: object) -> Path:
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours)
    image.putdata(indices.ravel().tolist())
    image.save(path, **options)
    return path


def test_indices_of_a_palette_are_labels_whatever_their_colours(tmp_path: Path, disc: np.ndarray) -> None:
    indices = np.where(disc, 2, 0).astype(np.uint8)
    indices[:20] = 1
    path = palette_mask(tmp_path / "p.png", indices, [0, 0, 0, 9, 9, 9, 255, 0, 0])
    np.testing.assert_array_equal(read(path)[0], indices > 0)
    np.testing.assert_array_equal(read(path, (2,))[0], indices == 2)
    np.testing.assert_array_equal(read(path, (0, 1))[0], indices != 2)


def test_a_transparent_index_is_background_and_an_opaque_index_0_is_not(tmp_path: Path, disc: np.ndarray) -> None:
    indices = np.where(disc, 0, 1).astype(np.uint8)
    for colours in ([255, 0, 0, 0, 0, 0], [0, 0, 0, 255, 255, 255]):
        path = palette_mask(tmp_path / "p.png", indices, colours, transparency=1)
        np.testing.assert_array_equal(read(path)[0], disc)
        np.testing.assert_array_equal(read(path, (1,))[0], ~disc)
    path = palette_mask(tmp_path / "p.png", indices, [255, 0, 0, 0, 0, 0], transparency=b"\xff\x00")
    np.testing.assert_array_equal(read(path)[0], disc)


def test_a_coloured_index_0_beside_a_black_one_is_noted(tmp_path: Path, disc: np.ndarray) -> None:
    indices = np.where(disc, 0, 1).astype(np.uint8)
    mask, notes = read(palette_mask(tmp_path / "p.png", indices, [255, 255, 255, 0, 0, 0]))
    np.testing.assert_array_equal(mask, ~disc)
    assert "index 0 counts as background although index 1 is the black one" in notes[0]


@pytest.mark.parametrize("quality", [20, 75, 95])
def test_a_lossy_mask_is_cut_at_half_of_its_range(tmp_path: Path, disc: np.ndarray, quality: int) -> None:
    grey = disc.astype(np.uint8) * 255
    for name, image in {"grey.jpg": grey, "colour.jpg": in_colours(disc, (0, 200, 0), (0, 0, 0))}.items():
        Image.fromarray(image).save(tmp_path / name, quality=quality)
        mask, notes = read(tmp_path / name)
        assert abs(mask.mean() - disc.mean()) < 0.004, name
        assert notes == ["the mask is lossy (JPEG); it was cut at half of its range"]
    assert (np.array(Image.open(tmp_path / "grey.jpg")) > 0).mean() > disc.mean() + 0.01
    np.testing.assert_array_equal(read(tmp_path / "grey.jpg", (255,))[0], read(tmp_path / "grey.jpg")[0])


def test_a_lossy_tiff_and_webp_are_known_for_what_they_are(tmp_path: Path, disc: np.ndarray) -> None:
    grey = Image.fromarray(disc.astype(np.uint8) * 255)
    grey.save(tmp_path / "m.tif", compression="jpeg")
    grey.convert("RGB").save(tmp_path / "m.webp", quality=60)
    for name in ("m.tif", "m.webp"):
        mask, notes = read(tmp_path / name)
        assert abs(mask.mean() - disc.mean()) < 0.004
        assert f"lossy ({'WebP' if name == 'm.webp' else 'JPEG'})" in notes[0]
    grey.convert("RGB").save(tmp_path / "exact.webp", lossless=True)
    mask, notes = read(tmp_path / "exact.webp")
    np.testing.assert_array_equal(mask, disc)
    assert notes == []


@pytest.mark.parametrize("labels", [(0, 1, 2), (0, 1, 255), (0, 80, 160, 240)])
def test_labels_in_a_lossy_file_are_refused(tmp_path: Path, labels: tuple[int, ...]) -> None:
    plane = np.zeros(SHAPE, np.uint8)
    for place, label in enumerate(labels):
        plane[40:150, 40 + 50 * place : 90 + 50 * place] = label
    Image.fromarray(plane).save(tmp_path / "labels.jpg", quality=95)
    for values in (None, (1,)):
        with pytest.raises(SlideError, match=r"must be black and white.*save the mask as a PNG"):
            read(tmp_path / "labels.jpg", values)


def test_an_empty_lossy_mask_and_a_full_one_are_no_errors(tmp_path: Path) -> None:
    for value in (0, 255):
        Image.fromarray(np.full(SHAPE, value, np.uint8)).save(tmp_path / "m.jpg")
        assert read(tmp_path / "m.jpg")[0].mean() == value / 255


def test_smooth_edges_of_an_export_are_cut_at_half_too(tmp_path: Path, disc: np.ndarray) -> None:
    large = cv2.resize(disc.astype(np.uint8) * 255, (SHAPE[1] * 5, SHAPE[0] * 5), interpolation=cv2.INTER_NEAREST)
    smooth = cv2.resize(cv2.GaussianBlur(large, (0, 0), 4), SHAPE[::-1], interpolation=cv2.INTER_AREA)
    for name, plane in {"m.png": smooth, "m16.png": smooth.astype(np.uint16) * 257}.items():
        Image.fromarray(plane).save(tmp_path / name)
        mask, notes = read(tmp_path / name)
        assert (mask != disc).mean() < 0.002
        assert notes == ["the mask's edges are smooth; it was cut at half of its range"]


def test_many_labels_are_not_taken_for_smooth_edges(tmp_path: Path) -> None:
    plane = np.zeros(SHAPE, np.uint16)
    label = 0
    for top in range(0, 180, 12):
        for left in range(0, 250, 12):
            label += 1
            plane[top : top + 10, left : left + 10] = label
    plane[150:, 100:] = 1000
    Image.fromarray(plane).save(tmp_path / "instances.png")
    mask, notes = read(tmp_path / "instances.png")
    np.testing.assert_array_equal(mask, plane > 0)
    assert "different values, and each but 0 counts as tissue" in notes[0]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_labels_of_every_depth_are_read_whole(tmp_path: Path, disc: np.ndarray, dtype: str) -> None:
    label = min(70_000, np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 70_000)
    plane = np.where(disc, label, 0).astype(dtype)
    plane[:10] = 1
    tifffile.imwrite(tmp_path / "m.tif", plane)
    tifffile.imwrite(tmp_path / "d.tif", plane, compression="adobe_deflate", tile=(64, 64))
    np.save(tmp_path / "m.npy", plane)
    for name in ("m.tif", "d.tif", "m.npy"):
        np.testing.assert_array_equal(read(tmp_path / name)[0], plane != 0, err_msg=name)
        np.testing.assert_array_equal(read(tmp_path / name, (label,))[0], disc & (plane != 1), err_msg=name)


@pytest.mark.parametrize("channels", [3, 4])
def test_small_labels_in_colours_of_16_bits_are_not_lost(tmp_path: Path, disc: np.ndarray, channels: int) -> None:
    samples = np.zeros((*SHAPE, channels), np.uint16)
    samples[..., 2] = disc * 3
    if channels == 4:
        samples[..., 3] = 65535
    cv2.imwrite(str(tmp_path / "m.png"), samples[..., [2, 1, 0, 3][:channels]])
    tifffile.imwrite(tmp_path / "m.tif", samples, photometric="rgb", extrasamples=["unassalpha"] * (channels - 3))
    for name in ("m.png", "m.tif"):
        np.testing.assert_array_equal(read(tmp_path / name)[0], disc)
        np.testing.assert_array_equal(read(tmp_path / name, (3,))[0], disc)


def test_one_bit_masks_are_read_also_where_white_is_zero(tmp_path: Path, disc: np.ndarray) -> None:
    Image.fromarray(disc).save(tmp_path / "m.png")
    Image.fromarray(disc).save(tmp_path / "fax.tif", compression="group4")
    tifffile.imwrite(tmp_path / "white.tif", ~disc, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "grey.tif", np.where(disc, 0, 255).astype(np.uint8), photometric="miniswhite")
    np.save(tmp_path / "m.npy", disc)
    for name in ("m.png", "fax.tif", "white.tif", "grey.tif", "m.npy"):
        np.testing.assert_array_equal(read(tmp_path / name)[0], disc, err_msg=name)


def test_what_is_no_number_is_background_and_noted(tmp_path: Path, disc: np.ndarray) -> None:
    plane = disc.astype(np.float32)
    plane[:48] = np.nan
    tifffile.imwrite(tmp_path / "m.tif", plane)
    mask, notes = read(tmp_path / "m.tif")
    np.testing.assert_array_equal(mask, plane == 1)
    assert notes == ["25.00% of the mask is NaN or infinite and counts as background"]


def test_fractions_are_shares_of_tissue_and_other_ranges_are_refused(tmp_path: Path, disc: np.ndarray) -> None:
    shares = np.where(disc, 0.7, 0.2).astype(np.float32)
    tifffile.imwrite(tmp_path / "m.tif", shares)
    mask, notes = read(tmp_path / "m.tif")
    np.testing.assert_array_equal(mask, disc)
    assert "cut at a half" in notes[0]
    with pytest.raises(SlideError, match="names labels, which are integers, got a mask of fractions"):
        read(tmp_path / "m.tif", (1,))
    tifffile.imwrite(tmp_path / "m.tif", shares * 100 + 0.5)
    with pytest.raises(SlideError, match=r"between 0 and 1, got values from 20\.5 to 70\.5"):
        read(tmp_path / "m.tif")


def test_values_below_0_count_and_are_noted(tmp_path: Path, disc: np.ndarray) -> None:
    np.save(tmp_path / "m.npy", np.where(disc, 1, -1).astype(np.int32))
    mask, notes = read(tmp_path / "m.npy")
    assert mask.all()
    assert "values below 0 (-1)" in notes[0]
    np.testing.assert_array_equal(read(tmp_path / "m.npy", (1,))[0], disc)
    np.testing.assert_array_equal(read(tmp_path / "m.npy", (-1,))[0], ~disc)


def test_values_are_looked_up_in_one_channel_and_refused_of_colours(tmp_path: Path, disc: np.ndarray) -> None:
    Image.fromarray(in_colours(disc, (0, 4, 0), (0, 2, 0))).save(tmp_path / "one.png")
    Image.fromarray(in_colours(disc, (4, 4, 4), (2, 2, 2))).save(tmp_path / "grey.png")
    for name in ("one.png", "grey.png"):
        np.testing.assert_array_equal(read(tmp_path / name, (4,))[0], disc)
    Image.fromarray(in_colours(disc, (4, 4, 0), (0, 2, 0))).save(tmp_path / "two.png")
    with pytest.raises(SlideError, match="names labels, got a mask in colours"):
        read(tmp_path / "two.png", (4,))
    Image.fromarray(in_colours(disc, (1, 1, 1, 255), (0, 0, 0, 0))).save(tmp_path / "alpha.png")
    with pytest.raises(SlideError, match="names labels, got a mask with transparency"):
        read(tmp_path / "alpha.png", (1,))


def test_values_that_the_mask_does_not_hold_are_named_with_those_it_holds(tmp_path: Path, disc: np.ndarray) -> None:
    Image.fromarray(disc.astype(np.uint8) * 3).save(tmp_path / "m.png")
    mask, notes = read(tmp_path / "m.png", (1, 2))
    assert not mask.any()
    assert notes == ["the mask holds none of the tissue values 1, 2; it holds 0, 3"]


def test_further_pages_and_channels_are_noted(tmp_path: Path, disc: np.ndarray) -> None:
    plane = disc.astype(np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([plane, 1 - plane, plane]), photometric="minisblack")
    Image.fromarray(plane).save(tmp_path / "m.gif", save_all=True, append_images=[Image.fromarray(1 - plane)])
    tifffile.imwrite(tmp_path / "five.tif", np.stack([plane] * 5, axis=-1), photometric="rgb")
    for name, words in {"pages.tif": "3 pages", "m.gif": "2 pages", "five.tif": "5 channels"}.items():
        mask, notes = read(tmp_path / name)
        np.testing.assert_array_equal(mask, disc)
        assert words in notes[0]


def test_planes_of_colours_that_lie_apart_are_read(tmp_path: Path, disc: np.ndarray) -> None:
    planes = np.stack([np.zeros(SHAPE, np.uint8), disc.astype(np.uint8), np.zeros(SHAPE, np.uint8)])
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read(tmp_path / "planar.tif")[0], disc)


def test_compressions_that_need_a_package_of_their_own_are_left_to_pillow(
    tmp_path: Path, disc: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate"):
        Image.fromarray(disc.astype(np.uint8)).save(tmp_path / f"{compression}.tif", compression=compression)

    def without_imagecodecs(*_: object, **__: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", without_imagecodecs)
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate"):
        np.testing.assert_array_equal(read(tmp_path / f"{compression}.tif")[0], disc)


def test_a_broken_tiff_and_arrays_of_other_shapes_are_refused(tmp_path: Path, disc: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "cut.tif", disc.astype(np.uint8), compression="adobe_deflate")
    whole = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "three.npy", np.zeros((3, 4, 5)))
    np.save(tmp_path / "objects.npy", np.array([[None]], dtype=object), allow_pickle=True)
    for name, words in {"cut.tif": "fails with", "three.npy": "two-dimensional", "objects.npy": "fails with"}.items():
        with pytest.raises(SlideError, match=words):
            read(tmp_path / name)


def test_too_many_pixels_are_refused_in_every_format(
    tmp_path: Path, disc: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_MAX_PX", 1000)
    Image.fromarray(disc).save(tmp_path / "m.png")
    tifffile.imwrite(tmp_path / "m.tif", disc)
    np.save(tmp_path / "m.npy", disc)
    for name in ("m.png", "m.tif", "m.npy"):
        with pytest.raises(SlideError, match="up to 1,000 pixels, got 256 × 192"):
            read(tmp_path / name)


def test_the_coarsest_level_of_the_same_view_that_is_fine_enough_is_chosen() -> None:
    sizes = [(4000, 3000), (2000, 1500), (1000, 750), (900, 300), (500, 375)]
    assert coarsest_level(sizes, lambda width: width >= 900) == 2
    assert coarsest_level(sizes, lambda width: width >= 5000) == 0
    assert coarsest_level(sizes, lambda _: True) == 4


def test_a_size_that_is_refused_is_not_decoded(tmp_path: Path, disc: np.ndarray) -> None:
    def refuse(width: int, height: int) -> None:
        raise SlideError(f"{width} × {height} will not do")

    Image.fromarray(disc).save(tmp_path / "m.png")
    whole = (tmp_path / "m.png").read_bytes()
    (tmp_path / "m.png").write_bytes(whole[:60])  # its header alone
    with pytest.raises(SlideError, match="256 × 192 will not do"):
        read_mask_image(tmp_path / "m.png", lambda _: True, refuse)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_mask_is_read_or_refused_and_never_ends_the_process(
    tmp_path: Path, disc: np.ndarray, seed: int
) -> None:
    plane = disc[::4, ::4].astype(np.uint8) * 255
    colours = np.stack([plane, plane // 2, plane * 0], axis=-1)
    for name, save in {
        "a.png": lambda path: Image.fromarray(plane).save(path),
        "a16.png": lambda path: cv2.imwrite(str(path), colours.astype(np.uint16) * 257),
        "a.gif": lambda path: Image.fromarray(plane).save(path),
        "deflate.tif": lambda path: tifffile.imwrite(path, colours, compression="adobe_deflate", tile=(16, 16)),
        "lzw.tif": lambda path: Image.fromarray(plane).save(path, compression="tiff_lzw"),
        "a.npy": lambda path: np.save(path, plane),
    }.items():
        save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        rng = np.random.default_rng(seed)
        for _ in range(12):
            data = bytearray(whole[: int(rng.integers(1, len(whole) + 1))] if rng.random() < 0.2 else whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            (tmp_path / name).write_bytes(data)
            try:
                mask, _ = tissue_of(read_mask_image(tmp_path / name, lambda _: True, small), name)
            except SlideError:
                continue
            assert mask.dtype == bool


def small(width: int, height: int) -> None:
    if width * height > 1_000_000:
        raise SlideError("larger than any slide of these tests")
