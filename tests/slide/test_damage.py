"""Damaged pixels are read from a finer level where one has them; otherwise the error says where they are."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from slides import GLASS, STAIN, draw_tissue, write_pyramid
from small_slides import small_model

from maskattn.errors import SlideError
from maskattn.slide.damage import Rectangle
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.run import run_slides
from maskattn.slide.tissue import find_tissue


def damage_level(path: Path, page: int, tiles: list[int] | None) -> None:
    """Overwrite compressed tiles of one level; None means all of them."""
    with tifffile.TiffFile(path) as file:
        level = file.pages[page]
        spoilt = range(len(level.dataoffsets)) if tiles is None else tiles
        segments = [(level.dataoffsets[tile], level.databytecounts[tile]) for tile in spoilt]
    with path.open("r+b") as file:
        for offset, size in segments:
            file.seek(offset)
            file.write(b"\xff" * size)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """3,000 × 2,200 px with levels 2 and 4 times smaller: 3 × 3 tiles of 256 px in the coarsest."""
    rgb, _ = draw_tissue(3000, 2200)
    return write_pyramid(tmp_path / "slide.tif", cv2.blur(rgb, (9, 9)), downsamples=(2, 4))


@pytest.mark.parametrize("tile", [0, 4, 8])
def test_a_bad_tile_of_a_coarse_level_is_read_from_the_finer_one(slide: Path, tile: int) -> None:
    whole = SlideReader(slide).thumbnail(750)
    damage_level(slide, 2, [tile])
    reader = SlideReader(slide)
    assert np.abs(reader.thumbnail(750).astype(int) - whole).max() <= 2
    row, column = divmod(tile, 3)
    (note,) = reader.notes
    assert note.startswith(f"x={column * 1024}, y={row * 1024} at level 2 cannot be decoded ('")
    assert note.endswith("a finer level was read instead")


def test_a_slide_whose_coarse_levels_are_all_bad_is_read_from_level_zero(slide: Path) -> None:
    whole = SlideReader(slide).read_region(100, 100, (1024, 1024), (256, 256))
    tissue = find_tissue(SlideReader(slide))
    damage_level(slide, 1, None)
    damage_level(slide, 2, None)
    reader = SlideReader(slide)
    assert np.abs(reader.read_region(100, 100, (1024, 1024), (256, 256)).astype(int) - whole).max() <= 4
    found = find_tissue(reader)
    assert (found.mask_HW == tissue.mask_HW).mean() > 0.99
    assert any("nor can" in note and "at level 2" in note for note in found.notes)


@pytest.mark.parametrize("tile", [0, 5, 95, 107])
def test_the_error_names_the_tile_that_fails(slide: Path, tile: int) -> None:
    damage_level(slide, 0, [tile])  # 12 × 9 tiles
    row, column = divmod(tile, 12)
    with pytest.raises(SlideError, match=rf"got x={column * 256}, y={row * 256} at level 0 of .* fails with '.*ZIP"):
        SlideReader(slide).read_region(0, 0, (3000, 2200), (3000, 2200))


def test_the_error_gives_level_zero_coordinates_when_a_coarse_level_and_level_zero_are_bad(slide: Path) -> None:
    damage_level(slide, 0, [107])
    damage_level(slide, 1, None)
    with pytest.raises(SlideError, match=r"got x=2816, y=2048 at level 0 of .*; the file is damaged there"):
        SlideReader(slide).read_region(2560, 1536, (440, 664), (220, 332))


def test_a_view_is_white_where_no_level_can_be_read_and_says_so(slide: Path) -> None:
    whole = SlideReader(slide).thumbnail(750)
    for page, tiles in ((0, None), (1, None), (2, [4])):
        damage_level(slide, page, tiles)
    reader = SlideReader(slide)
    seen = reader.thumbnail(750)
    assert (seen[256:512, 256:512] == 255).all()
    seen[256:512, 256:512] = whole[256:512, 256:512]
    np.testing.assert_array_equal(seen, whole)
    (note,) = reader.notes
    assert note.startswith("x=1024, y=1024 at level 0 cannot be decoded ('")
    assert note.endswith("; such regions count as glass")


def test_a_view_of_which_nothing_decodes_is_an_error(slide: Path) -> None:
    for page in range(3):
        damage_level(slide, page, None)
    reader = SlideReader(slide)
    for read in (lambda: reader.thumbnail(64), lambda: find_tissue(reader)):
        with pytest.raises(SlideError, match=r"at level 0 of .* fails with '.*ZIPDecode.*'; the file is damaged there"):
            read()


def test_one_bad_tile_of_a_slide_of_one_level_does_not_hide_its_tissue(tmp_path: Path) -> None:
    rgb = np.full((1500, 2000, 3), GLASS, np.uint8)
    rgb[400:1100, 900:1700] = STAIN
    path = write_pyramid(tmp_path / "s.tif", rgb, downsamples=())
    damage_level(path, 0, [0])
    tissue = find_tissue(SlideReader(path))
    assert tissue.tissue_fraction == pytest.approx(700 * 800 / 3e6, rel=0.1)
    assert any(note.startswith("x=0, y=0 at level 0 cannot be decoded") for note in tissue.notes)


def test_a_reader_that_met_damage_can_still_be_pickled(slide: Path) -> None:
    damage_level(slide, 2, [0])
    reader = SlideReader(slide)
    reader.thumbnail(100)
    assert pickle.loads(pickle.dumps(reader)).notes == reader.notes


@pytest.mark.parametrize("tile", [(256, 256), (240, 512), (1000, 7)])
def test_halves_are_cut_between_tiles_and_cover_the_complete_region(tile: tuple[int, int]) -> None:
    pieces, wholes = [Rectangle(37, 500, 1411, 1299)], []
    while pieces:
        piece = pieces.pop()
        halves = piece.halves(tile)
        if halves is None:
            wholes.append(piece)
        else:
            pieces.extend(halves)
    covered = np.zeros((1300, 1412), np.uint8)
    for piece in wholes:
        covered[piece.top : piece.bottom, piece.left : piece.right] += 1
        assert piece.left // tile[0] == (piece.right - 1) // tile[0]
        assert piece.top // tile[1] == (piece.bottom - 1) // tile[1]
    assert (covered[500:1299, 37:1411] == 1).all()
    assert covered.sum() == 799 * 1374


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prediction_says_what_was_read_from_a_finer_level(slide: Path, tmp_path: Path, workers: int) -> None:
    damage_level(slide, 1, None)  # the level that a model at 1 µm reads
    settings = RunSettings(tmp_path / "out", batch_size=16, workers=workers)
    (outcome,) = run_slides([SlideJob("slide", slide)], small_model(), settings)
    assert outcome.prediction is not None, outcome.reason
    (note,) = outcome.prediction.notes
    assert "at level 1 cannot be decoded ('" in note
    assert note.endswith("more regions of it; a finer level was read instead")
    assert outcome.prediction.counts.unreadable_tiles == 0
    assert read_prediction(tmp_path / "out" / "slide" / "prediction.json").notes == (note,)
