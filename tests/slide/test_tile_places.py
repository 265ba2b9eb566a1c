"""Positions of tiles: lattices with and without overlap, and exact shares of tissue."""

from __future__ import annotations

import numpy as np
import pytest
from small_slides import write_slide

from maskattn.errors import SlideError
from maskattn.slide.grid import make_grid
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tile_places import lay_tiles, tissue_share, with_tokens
from maskattn.slide.tissue import TissueMask
from maskattn.slide.tissue.mask import mask_of_slide


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> SlideInfo:
    with SlideReader(write_slide(tmp_path_factory.mktemp("slide") / "a.tiff")) as reader:
        return reader.info


@pytest.fixture
def tissue(info: SlideInfo) -> TissueMask:
    return mask_of_slide(np.random.default_rng(0).random((53, 71)) < 0.3, info, "drawn", [])


def area_by_hand(tissue: TissueMask, x: float, y: float, side: float) -> float:
    """Mask pixel by mask pixel."""
    width, height = tissue.px_lv0
    area = 0.0
    for row, column in np.argwhere(tissue.mask_HW):
        across = min((column + 1) * width, x + side) - max(column * width, x)
        down = min((row + 1) * height, y + side) - max(row * height, y)
        area += max(0.0, across) * max(0.0, down)
    return area / side**2


def test_shares_of_tissue_are_the_areas(tissue: TissueMask) -> None:
    coords = np.array([[0, 0], [33, 71], [301, 17], [540, 400], [600, 500]])
    shares = tissue_share(tissue, coords, 50, 3)
    for tile, (x, y) in enumerate(coords):
        for row in range(3):
            for column in range(3):
                expected = area_by_hand(tissue, x + column * 50 / 3, y + row * 50 / 3, 50 / 3)
                assert shares[tile, row, column] == pytest.approx(expected, abs=1e-6)
    assert not shares[-1].any()


def test_a_lattice_without_overlap_is_the_grid_of_slide_models(info: SlideInfo, tissue: TissueMask) -> None:
    laid = lay_tiles(info, tissue, patch_px=64, overlap_px=0, spacing_um=1.0, tile_px=64, min_tissue=0)
    grid = make_grid(info, tissue, tile_px=64, token_px=16, spacing_um=1.0)
    assert laid.tile_lv0 == grid.tile_lv0 == 64
    kept = {tuple(xy) for xy in laid.coords_lv0}
    assert {tuple(xy) for xy in grid.coords_lv0} <= kept
    tiles = with_tokens(laid, tissue, 16)
    assert tiles.token_keep_THW is not None
    of_grid = {tuple(xy): keep for xy, keep in zip(grid.coords_lv0, grid.token_keep_THW, strict=True)}
    for xy, keep in zip(tiles.coords_lv0, tiles.token_keep_THW, strict=True):
        if max(xy) < 384:  # away from the edge, where the grid drops tokens whose centre lies outside
            assert np.array_equal(keep, of_grid[tuple(xy)])
    assert tiles.tissue_T == pytest.approx(laid.tissue_T, abs=1e-5)


def test_overlapping_tiles_are_their_side_less_the_overlap_apart(info: SlideInfo) -> None:
    everything = mask_of_slide(np.ones((42, 56), bool), info, "drawn", [])
    laid = lay_tiles(info, everything, patch_px=32, overlap_px=8, spacing_um=2.0, tile_px=64, min_tissue=0)
    assert (laid.tile_lv0, laid.tile_px, laid.cells) == (64, 64, laid.kept_tiles)
    xs, ys = (np.unique(laid.coords_lv0[:, axis]) for axis in (0, 1))
    assert set(np.diff(xs)) == set(np.diff(ys)) == {48}
    assert xs[-1] + 64 >= info.width_px > xs[-2] + 64
    assert np.array_equal(laid.coords_lv0, sorted(laid.coords_lv0.tolist(), key=lambda xy: (xy[1], xy[0])))
    assert laid.tissue_T is not None
    hanging_over = laid.coords_lv0[:, 1] + 64 > info.height_px
    assert (laid.tissue_T[hanging_over] < 1).all()
    assert laid.tissue_T[~hanging_over & (laid.coords_lv0[:, 0] + 64 <= info.width_px)] == pytest.approx(1)


def test_tiles_with_too_little_tissue_are_left_out(info: SlideInfo) -> None:
    half = np.zeros((42, 56), bool)
    half[:, :28] = True  # the left 280 of 560 px
    tissue = mask_of_slide(half, info, "drawn", [])

    def columns(min_tissue: float) -> int:
        laid = lay_tiles(info, tissue, patch_px=64, overlap_px=0, spacing_um=1.0, tile_px=64, min_tissue=min_tissue)
        return len(np.unique(laid.coords_lv0[:, 0]))

    assert [columns(share) for share in (0, 0.375, 0.38, 1)] == [5, 5, 4, 4]


def test_impossible_sizes_are_refused(info: SlideInfo, tissue: TissueMask) -> None:
    with pytest.raises(SlideError, match=r"at least one level-0 pixel, got 8 px at 0.05 µm"):
        lay_tiles(info, tissue, patch_px=8, overlap_px=0, spacing_um=0.05, tile_px=64, min_tissue=0)
    tiny = SlideInfo(**{**vars(info), "width_px": 10_000_000, "height_px": 10_000_000})
    with pytest.raises(SlideError, match=r"up to 20,000,000 tiles, got 1,250,000 × 1,250,000"):
        lay_tiles(tiny, tissue, patch_px=8, overlap_px=0, spacing_um=1.0, tile_px=64, min_tissue=0)
