"""Tiles decoded without OpenSlide: the same pixels, and OpenSlide's own wherever a file is not plain."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tifffile

from maskattn.slide.formats.opening import open_image
from maskattn.slide.formats.openslide_image import OpenSlideImage
from maskattn.slide.formats.plain_tiles import PlainTilesImage

TILED = {"tile": (64, 48), "photometric": "rgb"}
JPEGS = [
    {"compression": "jpeg", "subsampling": by, "compressionargs": {"level": 85}} for by in ((1, 1), (2, 1), (2, 2))
]
OTHERS = [{"compression": name, "predictor": by} for name in ("lzw", "zlib", "deflate") for by in (False, True)]


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 90 * np.sin(x / 17 + c) * np.cos(y / (11 + c)) for c in range(3)], axis=-1)
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def write(path: Path, sizes=((211, 310),), **how) -> Path:
    """Write a TIFF with a level of each (height, width)."""
    with tifffile.TiffWriter(path) as file:
        for number, size in enumerate(sizes):
            file.write(picture(*size), **{**TILED, **how}, subfiletype=1 if number else 0, metadata=None)
    return path


def assert_same_as_openslide(path: Path, plain_levels: set[int]) -> None:
    ours, theirs, random = open_image(path), OpenSlideImage(path), Random(0)
    assert isinstance(ours, PlainTilesImage)
    assert set(ours._levels) == plain_levels
    for name in ("vendor", "series", "level_dimensions", "level_downsamples", "level_tiles", "properties"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for level, (width, height) in enumerate(ours.level_dimensions):
        for _ in range(20):
            x, y = random.randrange(width), random.randrange(height)
            size = random.randint(1, width - x), random.randint(1, height - y)
            found, expected = ours.read(level, x, y, *size), theirs.read(level, x, y, *size)
            assert found.shape == (size[1], size[0], 3 if level in plain_levels else 4)
            assert level not in plain_levels or (expected[..., 3] == 255).all()
            assert np.array_equal(found[..., :3], expected[..., :3]), (level, x, y, size)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("how", [*JPEGS, *OTHERS, {"compression": None}], ids=str)
def test_pixels_are_those_of_openslide(tmp_path, how):
    assert_same_as_openslide(write(tmp_path / "a.tiff", **how), {0})


def test_levels_whose_pixels_are_not_shifted_are_plain(tmp_path):
    path = write(tmp_path / "a.tiff", ((240, 320), (120, 160), (61, 81)), **JPEGS[2])
    assert OpenSlideImage(path).unshifted_levels == (0, 1)
    assert_same_as_openslide(path, {0, 1})


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395.svs"])
def test_real_slides_are_those_of_openslide(shared_slides, name):
    path = shared_slides / name
    assert_same_as_openslide(path, set(OpenSlideImage(path).unshifted_levels))


def spoilt(path: Path, how: str) -> Path:
    """Spoil the first tile of a file."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        start, length = page.dataoffsets[0], page.databytecounts[0]
        lengths = page.tags["TileByteCounts"].valueoffset
    data = bytearray(path.read_bytes())
    if how == "noise":
        data[start : start + length] = np.random.default_rng(1).integers(0, 256, length, np.uint8).tobytes()
    elif how == "cut":
        data[start + length // 2 : start + length] = bytes(length - length // 2)
    elif how == "another size":
        frame = data.index(b"\xff\xc0", start)
        data[frame + 5 : frame + 7] = (32).to_bytes(2, "big")
    elif how == "nothing":
        data[lengths : lengths + 4] = bytes(4)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("how", ["noise", "cut", "another size", "nothing"])
def test_a_spoilt_tile_is_what_openslide_makes_of_it(tmp_path, how):
    path = spoilt(write(tmp_path / "a.tiff", **JPEGS[2]), how)

    def outcome(make, x, y):
        image = make(path)
        try:
            return image.read(0, x, y, 60, 60)[..., :3].tolist()
        except Exception as error:
            return type(error), str(error)
        finally:
            image.close()

    for x, y in ((0, 0), (100, 100)):
        assert outcome(open_image, x, y) == outcome(OpenSlideImage, x, y)


def test_pages_of_one_size_are_left_to_openslide(tmp_path):
    assert isinstance(open_image(write(tmp_path / "a.tiff", ((211, 310), (211, 310)))), OpenSlideImage)


def test_alpha_is_left_to_openslide(tmp_path):
    path = tmp_path / "a.tiff"
    pixels = np.concatenate([picture(96, 128), np.full((96, 128, 1), 200, np.uint8)], axis=2)
    tifffile.imwrite(path, pixels, tile=(64, 48), photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    assert isinstance(open_image(path), OpenSlideImage)


def test_a_turned_picture_is_left_to_openslide(tmp_path):
    path = tmp_path / "a.tiff"
    with tifffile.TiffWriter(path) as file:
        file.write(picture(96, 128), **TILED, metadata=None, extratags=[(274, 3, 1, 3, True)])
    assert isinstance(open_image(path), OpenSlideImage)


def test_without_imagecodecs_openslide_reads_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tiff", **JPEGS[2])
    monkeypatch.delitem(sys.modules, "maskattn.slide.formats.plain_tiles")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert isinstance(open_image(path), OpenSlideImage)
