"""Pyramids of maps, read by tifffile, OpenSlide, ome-types and zarr, against relevance.h5."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import tifffile
from small_slides import SHAPE, write_slide

from maskattn.errors import ManifestError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.colours import COLOUR_MAPS, colour_limit, coloured
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pyramids.halving import halved
from maskattn.slide.pyramids.lattice import MapLattice
from maskattn.slide.pyramids.ome_tiff import write_ome_tiff
from maskattn.slide.pyramids.ome_zarr import write_ome_zarr
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

HAS_ZARR = importlib.util.find_spec("zarr") is not None


@pytest.fixture(scope="module", params=[1.0, 0.7])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, model: SlideModel) -> Path:
    """The outputs of a slide; at 0.7 µm its tokens are no whole number of pixels."""
    run_dir = tmp_path_factory.mktemp("run")
    slide = write_slide(run_dir / "disc.tiff", spacing_um=request.param)
    settings = RunSettings(run_dir / "out", batch_size=8, tokens=True, ome_tiff="both", zarr=HAS_ZARR)
    (outcome,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert outcome.status == "ok", outcome.reason
    return settings.out_dir / "disc"


def expected_map(folder: Path, of_class: int | None) -> np.ndarray:
    """The map at level 0 from the table: each pixel has the value of the token that its centre lies in."""
    with h5py.File(folder / "relevance.h5") as table:
        coords, keep = table["coords"][:], table["tokens/keep"][:]
        side = int(table["coords"].attrs["patch_size_level0"])
        if of_class is None:
            values = table["tokens/attention"][:] * table["tiles/attention"][:][:, None, None]
        else:
            values = table["tokens/relevance"][of_class]
    shown = np.full(SHAPE, np.nan, np.float32)
    token = ((np.arange(side) + 0.5) * keep.shape[1] / side).astype(int)
    for (x, y), kept, value in zip(coords, keep, values, strict=True):
        part = shown[y : y + side, x : x + side]
        of_pixel = np.where(kept, value, np.nan)[np.ix_(token, token)]
        part[:] = of_pixel[: part.shape[0], : part.shape[1]]
    return shown


@pytest.mark.parametrize(("name", "of_class"), [("heatmap_benign", 0), ("heatmap_low_high", 1), ("attention", None)])
def test_values_lie_on_level_zero_as_the_table_has_them(folder: Path, name: str, of_class: int | None) -> None:
    shown = tifffile.imread(folder / f"{name}.ome.tiff")
    assert shown.dtype == np.float32
    np.testing.assert_array_equal(shown, expected_map(folder, of_class))


def test_colours_are_those_of_the_values_on_white(folder: Path) -> None:
    shown, values = tifffile.imread(folder / "colours_benign.ome.tiff"), expected_map(folder, 0)
    known = np.isfinite(values)
    assert (shown[~known] == 255).all()
    with tifffile.TiffFile(folder / "heatmap_benign.ome.tiff") as file:
        spacing = float(file.ome_metadata.split('PhysicalSizeX="')[1].split('"')[0])
    limits = colour_limit(_on_lattice(values, 16 / spacing), "diverging")
    np.testing.assert_array_equal(shown[known], coloured(values[known], limits, COLOUR_MAPS["diverging"][0]))


def _on_lattice(values: np.ndarray, token_lv0: float) -> np.ndarray:
    centres = [
        np.minimum((np.arange(np.ceil(n / token_lv0)) * token_lv0 + 0.4 * token_lv0).astype(int), n - 1)
        for n in values.shape
    ]
    return values[np.ix_(*centres)]


@pytest.mark.skipif(not HAS_ZARR, reason="zarr is not installed")
def test_channels_add_up_to_a_picture_in_which_each_class_has_its_colour(folder: Path) -> None:
    told = json.loads((folder / "relevance.zarr" / "zarr.json").read_text())["attributes"]["ome"]["omero"]["channels"]
    *classes, attention = told
    assert [one["label"] for one in told] == ["relevance: benign", "relevance: low/high", "attention"]
    assert len({one["color"] for one in classes}) == len(classes)
    assert [one["active"] for one in told] == [True, True, False]
    for one in told:
        window = one["window"]
        assert window["min"] <= window["start"] == 0 < window["end"] <= max(window["max"], 1.0)
    assert attention["color"] == "FFFFFF"


@pytest.mark.skipif(not HAS_ZARR, reason="zarr is not installed")
def test_attention_below_zero_is_shown_on_both_sides_of_zero(tmp_path: Path) -> None:
    grid = SimpleNamespace(tile_lv0=32, token_lv0=16.0, width_px=64, height_px=32)
    coords = np.array([[0, 0], [32, 0]])
    lattice = MapLattice(2, grid, coords, tmp_path)
    values = np.array([[[-1.0, 2.0]], [[-0.5, 0.25]]], np.float32)  # (M, 1, T)
    for tile in range(2):
        lattice.paint(coords[tile : tile + 1], values[:, :, tile, None, None], np.ones((1, 2, 2), bool))
    write_ome_zarr(tmp_path / "maps.zarr", lattice, ["relevance: tumour", "attention"], "maps", 0.5)
    lattice.close()
    told = json.loads((tmp_path / "maps.zarr" / "zarr.json").read_text())["attributes"]["ome"]["omero"]["channels"]
    (of_class, attention) = (channel["window"] for channel in told)
    assert (of_class["start"], attention["start"]) == (0.0, -attention["end"])
    assert attention["end"] == pytest.approx(0.5, rel=1e-2)
    assert (attention["min"], attention["max"]) == (-0.5, 0.25)


def test_the_metadata_is_what_ome_types_takes(folder: Path) -> None:
    ome_types = pytest.importorskip("ome_types")
    for name, channel in (("heatmap_low_high", "relevance: low/high"), ("colours_benign", "relevance: benign")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ome = ome_types.from_tiff(folder / f"{name}.ome.tiff")
        (image,) = ome.images
        pixels = image.pixels
        assert image.name == channel
        assert pixels.channels[0].name == channel
        assert (pixels.size_x, pixels.size_y, pixels.size_z, pixels.size_t) == (SHAPE[1], SHAPE[0], 1, 1)
        assert pixels.physical_size_x in (1.0, 0.7)
        assert pixels.physical_size_x == pixels.physical_size_y
        assert pixels.physical_size_x_unit.value == "µm"
        assert pixels.type.value == ("float" if name.startswith("heatmap") else "uint8")
        assert len(pixels.channels) == 1


def test_the_file_is_tiled_and_its_levels_are_subifds(folder: Path) -> None:
    with tifffile.TiffFile(folder / "heatmap_benign.ome.tiff") as file:
        assert file.is_ome
        assert file.is_bigtiff
        (series,) = file.series
        assert [level.shape for level in series.levels] == [SHAPE, (210, 280)]
        assert all(level.pages[0].is_tiled for level in series.levels)
        assert series.levels[1].pages[0].subfiletype == 1
        assert len(file.pages) == 1


def test_openslide_opens_the_colours(folder: Path) -> None:
    with openslide.OpenSlide(folder / "colours_benign.ome.tiff") as slide:
        assert slide.dimensions == SHAPE[::-1]
        shown = np.asarray(slide.read_region((100, 80), 0, (200, 150)).convert("RGB"))
    np.testing.assert_array_equal(shown, tifffile.imread(folder / "colours_benign.ome.tiff")[80:230, 100:300])


@pytest.mark.skipif(not HAS_ZARR, reason="needs zarr")
def test_the_zarr_holds_the_tokens_and_where_they_lie(folder: Path) -> None:
    import zarr

    group = zarr.open_group(folder / "relevance.zarr", mode="r")
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    assert [channel["label"] for channel in ome["omero"]["channels"]] == [
        "relevance: benign",
        "relevance: low/high",
        "attention",
    ]
    (image,) = ome["multiscales"]
    assert [axis["name"] for axis in image["axes"]] == ["c", "y", "x"]
    values = group["0"][:]
    assert group["0"].metadata.dimension_names == ("c", "y", "x")
    scale, translation = (
        step[kind]
        for step, kind in zip(image["datasets"][0]["coordinateTransformations"], ("scale", "translation"), strict=True)
    )
    with tifffile.TiffFile(folder / "attention.ome.tiff") as file:
        spacing = float(file.ome_metadata.split('PhysicalSizeX="')[1].split('"')[0])
    for channel, of_class in ((0, 0), (1, 1), (2, None)):
        expected = expected_map(folder, of_class)
        # The pixel of level 0 in the middle of each token.
        row, column = np.indices(values.shape[1:])
        pixels = [(index * scale[1] + translation[1]) / spacing + 0.2 for index in (row, column)]
        y, x = (np.rint(pixel).astype(int) for pixel in pixels)
        inside = (y < SHAPE[0]) & (x < SHAPE[1])
        np.testing.assert_array_equal(values[channel][inside], expected[y[inside], x[inside]])


@pytest.mark.parametrize("token_lv0", [1.5, 6.5])
def test_a_level_has_the_tokens_at_its_pixels_or_means_of_the_level_below(tmp_path: Path, token_lv0: float) -> None:
    rng = np.random.default_rng(0)
    grid: Any = SimpleNamespace(token_lv0=token_lv0, tile_lv0=52, width_px=1501, height_px=1203)
    lattice = MapLattice(1, grid, np.zeros((0, 2), np.int64), tmp_path)
    tokens = rng.normal(size=lattice.values_MRC.shape[1:]).astype(np.float32)
    tokens[:90, :100] = np.nan
    lattice.values_MRC[0] = tokens
    write_ome_tiff(tmp_path / "map.ome.tiff", lattice, 0, "map", 0.25)
    lattice.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.ome.tiff"]
    with tifffile.TiffFile(tmp_path / "map.ome.tiff") as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [(1203, 1501), (602, 751), (301, 376)]
    for level, shown in enumerate(levels):
        if 2**level <= token_lv0:
            indices = [
                np.minimum(((np.arange(length) + 0.5) * 2**level / token_lv0).astype(int), count - 1)
                for length, count in zip(shown.shape, tokens.shape, strict=True)
            ]
            np.testing.assert_array_equal(shown, tokens[np.ix_(*indices)])
        else:
            np.testing.assert_array_equal(shown, halved(levels[level - 1]))


def test_halving_leaves_out_what_is_unknown() -> None:
    nan = np.nan
    values = np.array([[1, 3, nan], [nan, 5, nan], [7, nan, 2]], np.float32)
    np.testing.assert_array_equal(halved(values), [[3, nan], [7, 2]])


def test_without_tokens_a_tile_has_one_value_on_its_kept_tokens(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, ome_tiff="values"))
    assert outcome.status == "ok", outcome.reason
    out = settings.out_dir / "disc"
    assert not list(out.glob("colours_*")) + list(out.glob("*.zarr"))
    shown = tifffile.imread(out / "heatmap_benign.ome.tiff")
    with h5py.File(out / "relevance.h5") as table:
        for (x, y), value in zip(table["coords"][:], table["tiles/relevance"][0], strict=True):
            part = shown[y : y + 64, x : x + 64]
            assert set(part[np.isfinite(part)]) == {value}
    assert np.isfinite(shown).sum() == outcome.prediction.counts.kept_tokens * 16 * 16


def test_a_slide_with_both_serves_a_run_that_asks_for_one(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    for asked, status in (("both", "ok"), ("values", "skipped"), ("off", "skipped")):
        (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, ome_tiff=asked))
        assert outcome.status == status, outcome.reason


@pytest.fixture
def _without_zarr(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "zarr" else find(name, *more))


@pytest.mark.usefixtures("_without_zarr")
def test_a_zarr_is_refused_at_once_where_the_package_is_missing(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    with pytest.raises(ManifestError, match=r"--zarr needs the package zarr, got none; pip install 'maskattn\[zarr\]'"):
        run_slides([SlideJob("disc", slide)], model, replace(settings, zarr=True))


@pytest.mark.parametrize(("stride", "origin", "cell"), [(64, 0, 64), (32, 0, 32), (48, 16, 16), (51, 7, 4)])
def test_tiles_that_overlap_or_begin_anywhere_are_placed_correctly(
    tmp_path: Path, stride: int, origin: int, cell: float
) -> None:
    grid: Any = SimpleNamespace(token_lv0=64.0, tile_lv0=64, width_px=400, height_px=300)
    xs = np.arange(origin, 300, stride)
    coords = np.stack([xs, np.full(len(xs), origin)], axis=1)
    lattice = MapLattice(1, grid, coords, tmp_path)
    assert lattice.cell_lv0 == cell
    values = np.arange(1.0, len(xs) + 1)
    lattice.paint(coords, values[None, :, None, None], np.ones((len(xs), 1, 1), bool))
    shown = lattice.sample(0, 0, 0, 0, (300, 400))
    expected = np.full((300, 400), np.nan)
    for x, value in zip(xs, values, strict=True):
        expected[origin : origin + 64, x : x + 64] = value
    lattice.close()
    off = ~((shown == expected) | (np.isnan(shown) & np.isnan(expected)))
    if stride != 51:
        assert not off.any()
    else:  # no more than half a cell at each edge
        assert off.sum() <= 64 * 2 * 2 * len(xs) + 400 * 2 * 2
