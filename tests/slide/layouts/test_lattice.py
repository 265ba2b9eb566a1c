from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskattn.errors import SlideError
from maskattn.slide.layouts import TileCoords, grid_cells


def placed(coords: np.ndarray, **header: object) -> TileCoords:
    return TileCoords(slide_id="s", coords_T2=coords, layout="trident", source=Path("s.h5"), **header)


def cells(seed: int = 0, tiles: int = 60, rows: int = 40, columns: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of some cells, in no order."""
    chosen = np.random.default_rng(seed).choice(rows * columns, tiles, replace=False)
    return chosen // columns, chosen % columns


@pytest.mark.parametrize("origin", [0, 5, 300])
@pytest.mark.parametrize(
    "header", [{"patch_size_lv0": 512}, {"patch_size_px": 256, "patch_size_lv0": 640, "overlap_px": 51}]
)
def test_tiles_on_a_lattice_have_their_rows_and_columns_in_the_order_they_came(
    origin: int, header: dict[str, object]
) -> None:
    row, column = cells()
    coords = np.stack((column, row), axis=1) * 512 + origin
    tiles = placed(coords, width_px=origin + 90 * 512, height_px=origin + 40 * 512, **header)
    found_row, found_column, keep_HW = grid_cells(tiles)
    np.testing.assert_array_equal(found_row, row)
    np.testing.assert_array_equal(found_column, column)
    assert keep_HW.shape == (40, 90)
    np.testing.assert_array_equal(np.argwhere(keep_HW), np.array(sorted(zip(row, column, strict=True))))


def test_complete_cells_before_the_first_tile_count(tmp_path: Path) -> None:
    row, column = cells()
    coords = np.stack((column + 7, row + 11), axis=1) * 512 + 3
    found_row, found_column, keep_HW = grid_cells(placed(coords, patch_size_lv0=512))
    np.testing.assert_array_equal(found_row, row + 11)
    np.testing.assert_array_equal(found_column, column + 7)
    assert keep_HW.shape == (found_row.max() + 1, found_column.max() + 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_is_not_an_integer_is_fitted_over_the_complete_slide(seed: int) -> None:
    # 256 µm at 0.2523 µm: each tile rounds the step of 1014.66 px, which drifts by 30 px over 90 tiles of 1015.
    row, column = cells(seed)
    coords = np.round(np.stack((column, row), axis=1) * (256 / 0.2523)).astype(np.int64)
    for side in (1015, None):
        found_row, found_column, _ = grid_cells(placed(coords, patch_size_lv0=side))
        np.testing.assert_array_equal(found_row - found_row.min(), row - row.min())
        np.testing.assert_array_equal(found_column - found_column.min(), column - column.min())


def test_the_step_of_clams_features_is_found_in_them() -> None:
    row, column = cells(tiles=1200)
    coords = np.stack((column, row), axis=1) * 224
    found_row, found_column, _ = grid_cells(placed(coords))
    np.testing.assert_array_equal(found_row, row)
    np.testing.assert_array_equal(found_column, column)


def test_two_lattices_are_no_grid() -> None:
    row, column = cells()
    coords = np.stack((column, row), axis=1) * 512
    coords[30:] += 131
    with pytest.raises(SlideError, match=r"must lie on one lattice .* off the lattice of 512 px, in s.h5; CLAM uses"):
        grid_cells(placed(coords, patch_size_lv0=512))


def test_a_tile_that_comes_twice_is_refused() -> None:
    coords = np.array([[0, 0], [512, 0], [0, 0]])
    with pytest.raises(SlideError, match="got 3 tiles on 2 cells"):
        grid_cells(placed(coords, patch_size_lv0=512))


def test_a_grid_larger_than_any_slide_is_refused() -> None:
    coords = np.array([[0, 0], [1, 0], [0, 50_000_000]])
    with pytest.raises(SlideError, match=r"up to 20,000,000 cells.*check that the coordinates are level-0 pixels"):
        grid_cells(placed(coords))


def test_one_tile_and_none_have_a_grid() -> None:
    one = placed(np.array([[1024, 512]]), patch_size_lv0=512)
    assert [part.tolist() for part in grid_cells(one)[:2]] == [[1], [2]]
    assert grid_cells(replace(one, coords_T2=np.empty((0, 2), np.int64)))[2].shape == (0, 0)
