from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slides import make_slide

import maskattn.slide.grid as grid_module
from maskattn.errors import SlideError
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.tissue import TissueMask, find_tissue


def info_of(width: int, height: int, spacing_um: float = 0.5) -> SlideInfo:
    levels = ((width, height),), ((1.0, 1.0),)
    return SlideInfo(Path("s.svs"), width, height, *levels, spacing_um, "override", None, None, {})


def tissue_of(mask: np.ndarray, info: SlideInfo) -> TissueMask:
    px_lv0 = (info.width_px / mask.shape[1], info.height_px / mask.shape[0])
    return TissueMask(mask, info.spacing_um * sum(px_lv0) / 2, px_lv0, "file", float(mask.mean()))


def everywhere(info: SlideInfo) -> TissueMask:
    return tissue_of(np.ones((3, 5), bool), info)


def test_tiles_and_tokens_lie_where_their_level_zero_pixels_do() -> None:
    info = info_of(1000, 600, spacing_um=0.499)
    mask = np.zeros((600, 1000), bool)
    mask[300, 700] = True
    grid = make_grid(info, tissue_of(mask, info), tile_px=128, token_px=16, spacing_um=1.0)
    assert grid.tile_lv0 == 257  # round(128 · 1.0 / 0.499)
    assert grid.token_lv0 == 32.125
    assert grid.coords_lv0.tolist() == [[514, 257]]
    assert np.argwhere(grid.keep_HW).tolist() == [[1, 2]]
    h, w = int((300.5 - 257) / 32.125), int((700.5 - 514) / 32.125)
    assert np.argwhere(grid.token_keep_THW).tolist() == [[0, h, w]]


def test_the_order_is_row_major() -> None:
    info = info_of(1024, 768)
    grid = make_grid(info, everywhere(info), tile_px=256, token_px=32, spacing_um=0.5)
    assert grid.coords_lv0.tolist() == [[x, y] for y in (0, 256, 512) for x in (0, 256, 512, 768)]
    assert grid.coords_lv0.dtype == np.int64
    np.testing.assert_array_equal(np.argwhere(grid.keep_HW)[:, ::-1] * 256, grid.coords_lv0)


def test_tokens_are_kept_by_their_area_of_tissue() -> None:
    info = info_of(64, 64)
    mask = np.zeros((64, 64), bool)
    mask[:, :8] = True  # half of the first column of tokens is tissue
    mask[0, 16] = True  # a 256th of one token is tissue
    tissue = tissue_of(mask, info)

    def kept(min_token_fraction: float) -> list[list[int]]:
        grid = make_grid(info, tissue, tile_px=64, token_px=16, spacing_um=0.5, min_token_fraction=min_token_fraction)
        return np.argwhere(grid.token_keep_THW[0])[:, ::1].tolist() if grid.kept_tiles else []

    column = [[0, 0], [1, 0], [2, 0], [3, 0]]
    assert kept(0.0) == sorted([*column, [0, 1]])
    assert kept(1 / 256) == sorted([*column, [0, 1]])
    assert kept(0.01) == column
    assert kept(0.5) == column
    assert kept(0.51) == []


def test_a_token_entirely_within_tissue_is_kept_at_any_fraction() -> None:
    info = info_of(2220, 2967, spacing_um=0.499)
    grid = make_grid(info, everywhere(info), tile_px=128, token_px=16, spacing_um=1.0, min_token_fraction=1.0)
    assert grid.kept_tokens == int(2220 / 32.125) * int(2967 / 32.125)


def test_the_edge_belongs_to_the_token_whose_centre_is_in_the_slide() -> None:
    for width, columns in ((64, 4), (71, 4), (72, 5), (79, 5), (80, 5), (87, 5), (88, 6)):
        info = info_of(width, 16)
        for masked in (True, False):
            grid = make_grid(info, everywhere(info), tile_px=64, token_px=16, spacing_um=0.5, masked=masked)
            assert grid.tokens == columns
            assert grid.kept_tokens == columns
            assert grid.cells == (1 if columns <= 4 else 2)
            assert grid.skipped_tokens == 0


@pytest.mark.parametrize(("width", "height"), [(16, 16), (1, 1), (1, 500), (100, 3)])
def test_a_slide_smaller_than_a_tile_has_a_padded_cell(width: int, height: int) -> None:
    info = info_of(width, height)
    grid = make_grid(info, everywhere(info), tile_px=512, token_px=32, spacing_um=0.5)
    assert grid.keep_HW.tolist() == [[True]]
    assert grid.coords_lv0.tolist() == [[0, 0]]
    assert grid.kept_tokens == grid.tokens >= 1


def test_a_slide_without_tissue_keeps_nothing() -> None:
    info = info_of(1000, 700)
    grid = make_grid(info, tissue_of(np.zeros((7, 10), bool), info), tile_px=128, token_px=16, spacing_um=0.5)
    assert (grid.kept_tiles, grid.kept_tokens) == (0, 0)
    assert grid.coords_lv0.shape == (0, 2)
    assert grid.token_keep_THW.shape == (0, 8, 8)
    assert grid.cells == 48
    assert grid.skipped_tokens == grid.tokens == 44 * 63


def test_unmasked_keeps_every_cell_and_every_token_in_the_slide() -> None:
    info = info_of(1000, 700)
    empty = tissue_of(np.zeros((7, 10), bool), info)
    for tissue in (None, empty):
        grid = make_grid(info, tissue, tile_px=128, token_px=16, spacing_um=0.5, masked=False)
        assert grid.kept_tiles == grid.cells == 48
        assert grid.kept_tokens == grid.tokens
        assert grid.token_keep_THW[0].all()


@settings(deadline=None, max_examples=50)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    spacing_um=st.floats(0.2, 2.0),
    band=st.integers(1, 500),
    seed=st.integers(0, 1000),
)
def test_walking_in_bands_changes_nothing(size: tuple[int, int], spacing_um: float, band: int, seed: int) -> None:
    info = info_of(*size, spacing_um=spacing_um)
    mask = np.random.default_rng(seed).random((37, 23)) < 0.1
    arguments: dict[str, Any] = {"tile_px": 64, "token_px": 8, "spacing_um": 1.0, "min_token_fraction": 0.05}
    whole = make_grid(info, tissue_of(mask, info), **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_module, "_BAND_TOKENS", band)
        banded = make_grid(info, tissue_of(mask, info), **arguments)
    np.testing.assert_array_equal(banded.keep_HW, whole.keep_HW)
    np.testing.assert_array_equal(banded.coords_lv0, whole.coords_lv0)
    np.testing.assert_array_equal(banded.token_keep_THW, whole.token_keep_THW)
    assert whole.token_keep_THW.any(axis=(1, 2)).all()


def test_a_gigapixel_grid_is_small() -> None:
    info = info_of(40_000, 40_000)
    mask = np.zeros((2500, 2500), bool)
    mask[500:1800, 600:1300] = True
    grid = make_grid(info, tissue_of(mask, info), tile_px=256, token_px=32, spacing_um=0.5)
    assert grid.keep_HW.shape == (157, 157)
    held = sum(getattr(grid, name).nbytes for name in ("keep_HW", "coords_lv0", "token_keep_THW"))
    assert held < 2 << 20
    assert grid.kept_tokens == pytest.approx(1250 * 1250 * mask.mean(), rel=0.01)


def test_an_absurd_grid_is_refused() -> None:
    info = info_of(200_000, 200_000, spacing_um=19.0)
    with pytest.raises(SlideError, match=r"up to 20,000,000 tiles, got .* at 19 µm per pixel; check its spacing"):
        make_grid(info, everywhere(info), tile_px=256, token_px=32, spacing_um=0.5)
    with pytest.raises(SlideError, match=r"at least one level-0 pixel, got 16 px at 0.5 µm on a slide of 19 µm"):
        make_grid(info_of(1000, 1000, 19.0), None, tile_px=16, token_px=8, spacing_um=0.5, masked=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_px": 24}, "token_px to divide tile_px, got tile_px=128, token_px=24"),
        ({"token_px": 0}, "got tile_px=128, token_px=0"),
        ({"tile_px": -128}, "got tile_px=-128"),
        ({"spacing_um": 0.0}, "got spacing_um=0.0; use the model's"),
        ({"spacing_um": float("nan")}, "got spacing_um=nan"),
        ({"min_token_fraction": 1.5}, "got min_token_fraction=1.5"),
        ({"min_token_fraction": float("nan")}, "got min_token_fraction=nan"),
        ({"tissue": None}, "got tissue=None; find_tissue or load_mask"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    info = info_of(100, 100)
    arguments: dict[str, Any] = {"tissue": everywhere(info), "tile_px": 128, "token_px": 16, "spacing_um": 0.5}
    arguments.update(changes)
    with pytest.raises(ValueError, match=message):
        make_grid(info, arguments.pop("tissue"), **arguments)


def test_another_slides_mask_is_refused() -> None:
    tissue = everywhere(info_of(100, 100))
    with pytest.raises(ValueError, match="mask of the same slide, got one that covers 100 × 100 level-0 pixels"):
        make_grid(info_of(100, 200), tissue, tile_px=128, token_px=16, spacing_um=0.5)


def test_a_missing_extension_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_native(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "maskattn._native":
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_native)
    info = info_of(100, 100)
    with pytest.raises(ImportError, match=r"maskattn\._native, which was not built; install a C\+\+17 compiler"):
        make_grid(info, everywhere(info), tile_px=128, token_px=16, spacing_um=0.5)
    make_grid(info, None, tile_px=128, token_px=16, spacing_um=0.5, masked=False)


def test_the_grid_of_a_drawn_slide_lies_on_its_tissue(tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "s.tif", 1500, 1100, spacing_um=0.7)
    with SlideReader(slide.path) as reader:
        grid = make_grid(reader.info, find_tissue(reader), tile_px=64, token_px=16, spacing_um=1.0)
    kept = drawn_on(slide.tissue_HW.shape, grid)
    assert kept[slide.tissue_HW].mean() > 0.99
    assert kept[~slide.tissue_HW].mean() < 0.1
    assert isinstance(grid, TokenGrid)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.tile_px = 3


def drawn_on(shape: tuple[int, ...], grid: TokenGrid) -> np.ndarray:
    """The level-0 pixels that kept tokens cover."""
    covered = np.zeros(shape, bool)
    for (x, y), tokens in zip(grid.coords_lv0, grid.token_keep_THW, strict=True):
        for h, w in np.argwhere(tokens):
            left, top = x + w * grid.token_lv0, y + h * grid.token_lv0
            covered[round(top) : round(top + grid.token_lv0), round(left) : round(left + grid.token_lv0)] = True
    return covered
