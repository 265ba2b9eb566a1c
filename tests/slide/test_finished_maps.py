"""Maps are read back at token resolution, at their position on the slide, and at coarser levels."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from maskattn.errors import SlideError
from maskattn.slide.colours import coloured, positions_of
from maskattn.slide.finished import build_mosaic, open_maps
from maskattn.slide.layouts.tile_features import TileHeader
from maskattn.slide.tables import relevance_table

TILE, SIDE = 64, 4


@pytest.fixture(params=[True, False], ids=["tokens", "tiles"])
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A table of five tiles of a slide of 4 × 3 cells, with random maps of two classes."""
    rng = np.random.default_rng(0)
    cells = np.array([[0, 0], [2, 0], [1, 1], [3, 1], [0, 2]])
    maps = {
        "cells": cells,
        "relevance": rng.normal(size=(2, 5)).astype(np.float32),
        "attention": rng.random(5).astype(np.float32),
        "tokens": rng.normal(size=(2, 5, SIDE, SIDE)).astype(np.float32),
        "token_attention": rng.random((5, SIDE, SIDE)).astype(np.float32),
        "keep": rng.random((5, SIDE, SIDE)) > 0.3,
    }
    header = TileHeader(
        slide_id="s",
        patch_size_px=TILE,
        patch_size_lv0=TILE,
        spacing_um=1.0,
        width_px=4 * TILE - 10,
        height_px=3 * TILE,
        magnification=20.0,
    )
    path = tmp_path / "relevance.h5"
    shape = (SIDE, SIDE) if request.param else None
    names = ("a", "b/ü")
    with relevance_table(path, names, maps["relevance"], maps["attention"], cells * TILE, header, "m", shape) as write:
        if request.param:
            write(np.arange(5), maps["tokens"] * maps["keep"], maps["token_attention"] * maps["keep"], maps["keep"])
    return path, maps


def test_a_mosaic_has_every_value_where_its_token_lies(drawn: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, maps = drawn
    with open_maps(path) as table:
        for index in range(3):
            finest = build_mosaic(table, index).levels[0]
            side = SIDE if table.tokens_hw else 1
            expected = np.full((3 * side, 4 * side), np.nan, np.float32)
            for tile, (column, row) in enumerate(maps["cells"]):
                where = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
                if side == 1:
                    expected[where] = [*maps["relevance"][:, tile], maps["attention"][tile]][index]
                    continue
                tokens = [*maps["tokens"][:, tile], maps["token_attention"][tile] * maps["attention"][tile]][index]
                expected[where] = np.where(maps["keep"][tile], tokens, np.nan)
            np.testing.assert_array_equal(finest, expected)
            assert table.step_lv0 == TILE / side


def test_coarser_levels_are_means_of_the_kept_tokens(drawn: tuple[Path, dict[str, np.ndarray]]) -> None:
    with open_maps(drawn[0]) as table:
        mosaic = build_mosaic(table, 0, side=1)
    for finer, coarser in zip(mosaic.levels, mosaic.levels[1:], strict=False):
        for row, column in np.ndindex(coarser.shape):
            part = finer[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            if np.isfinite(part).any():
                assert coarser[row, column] == pytest.approx(np.nanmean(part), rel=1e-5)
            else:
                assert np.isnan(coarser[row, column])
    assert mosaic.levels[-1].shape == (1, 1)


def test_a_chunk_is_a_window_that_ends_in_nothing(drawn: tuple[Path, dict[str, np.ndarray]]) -> None:
    with open_maps(drawn[0]) as table:
        mosaic = build_mosaic(table, 1)
    values = mosaic.levels[0]
    chunk = mosaic.chunk(0, 0, 0, 64)
    np.testing.assert_array_equal(chunk[: values.shape[0], : values.shape[1]], values)
    assert np.isnan(chunk[values.shape[0] :]).all()
    for level, column, row in ((9, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, -1), (0, 10**30, 0)):
        with pytest.raises(IndexError):
            mosaic.chunk(level, column, row, 64)


def test_the_tile_at_a_position_is_the_one_that_covers_it(drawn: tuple[Path, dict[str, np.ndarray]]) -> None:
    with open_maps(drawn[0]) as table:
        assert table.tile_at(0, 0) == 0
        assert table.tile_at(TILE - 0.01, 10) == 0
        assert table.tile_at(TILE, 10) is None
        assert table.tile_at(3 * TILE, TILE) == 3
        assert table.tile_at(float("nan"), 0) is None


def test_a_file_that_is_no_table_is_refused_and_the_callers_own_errors_are_not_renamed(
    tmp_path: Path, drawn: tuple[Path, dict[str, np.ndarray]]
) -> None:
    with pytest.raises(SlideError, match="must be a relevance"), open_maps(tmp_path / "absent.h5"):
        pass
    with pytest.raises(KeyError, match="mine"), open_maps(drawn[0]):
        raise KeyError("mine")


@pytest.mark.parametrize("way", ["external storage", "external link", "virtual"])
def test_a_table_never_reads_another_file(way: str, tmp_path: Path, drawn: tuple[Path, dict[str, np.ndarray]]) -> None:
    path = drawn[0]
    other = tmp_path / "other"
    other.write_bytes(b"secret!!" * 100)
    with h5py.File(path, "r+") as file:
        shape = file["tiles/attention"].shape
        del file["tiles/attention"]
        if way == "external storage":
            file.create_dataset("tiles/attention", shape, np.float32, external=[(str(other), 0, 400)])
        elif way == "external link":
            file["tiles/attention"] = h5py.ExternalLink(str(other), "/x")
        else:
            layout = h5py.VirtualLayout(shape, np.float32)
            layout[:] = h5py.VirtualSource(str(other), "x", shape)
            file.create_virtual_dataset("tiles/attention", layout)
    with pytest.raises(SlideError, match="lies in another file"), open_maps(path):
        pass


def test_zero_is_in_the_middle_of_signed_colours_and_the_ends_are_the_limits() -> None:
    positions = positions_of(np.array([-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0]), (-4.0, 4.0))
    np.testing.assert_allclose(positions, [0, 0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(positions_of(np.array([0.0, 1.0, 4.0]), (0.0, 4.0)), [0, 0.5, 1])
    colours = coloured(np.array([-1.0, np.nan, 1.0]), (-1.0, 1.0), "RdBu_r")
    assert colours[0, 2] > colours[0, 0]
    assert colours[2, 0] > colours[2, 2]
