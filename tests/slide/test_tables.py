from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from maskattn.files import replacing
from maskattn.slide.prediction import (
    ModelIdentity,
    SlideCounts,
    SlideFile,
    SlidePrediction,
    read_prediction,
)
from maskattn.slide.tables import (
    TileGeometry,
    read_features,
    relevance_table,
    write_features,
)

GEOMETRY = TileGeometry(128, 257, 20.0, 9.96, 2220, 2967)
COORDS = np.array([[0, 0], [257, 0], [0, 257]])
FEATURES = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_features_come_back_and_have_tridents_attributes(tmp_path: Path) -> None:
    write_features(tmp_path / "features.h5", FEATURES, COORDS, GEOMETRY, "slide")
    table = read_features(tmp_path / "features.h5")
    assert (table.layout, table.unit, table.tile_size) == ("trident", "px", 257.0)
    np.testing.assert_array_equal(table.features_TC, FEATURES)
    np.testing.assert_array_equal(table.coords_T2, COORDS)
    with h5py.File(tmp_path / "features.h5") as file:
        attributes = dict(file["coords"].attrs)
        assert file["coords"].dtype == np.int64
    expected = {
        "patch_size": 128,
        "patch_size_level0": 257,
        "level0_magnification": 20.0,
        "target_magnification": 9.96,
        "overlap": 0,
        "level0_width": 2220,
        "level0_height": 2967,
        "name": "slide",
    }
    assert {name: attributes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("attributes", "step", "factor", "tile_size"),
    [
        ({"tile_size_um": 256.0, "tile_size_px": 224}, 256.0, 1.0, 256.0),
        ({"tile_size": 256.0, "unit": "um"}, 256.0, 1.0, 256.0),
        ({}, 224.0, 256 / 224, 256.0),
    ],
)
def test_stamps_features_are_read_in_um(
    tmp_path: Path, attributes: dict[str, object], step: float, factor: float, tile_size: float
) -> None:
    coords = np.array([[0, 0], [1, 0], [0, 2]]) * step
    with h5py.File(tmp_path / "stamp.h5", "w") as file:
        file["feats"], file["coords"] = FEATURES.astype(np.float16), coords
        file.attrs.update(attributes)
    table = read_features(tmp_path / "stamp.h5")
    assert (table.layout, table.unit, table.tile_size) == ("stamp", "um", tile_size)
    np.testing.assert_allclose(table.coords_T2, coords * factor)
    assert table.features_TC.dtype == np.float32


@pytest.mark.parametrize("batch", [(), (1,)])
def test_clams_features_are_read_with_and_without_a_batch_dimension(tmp_path: Path, batch: tuple[int, ...]) -> None:
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = FEATURES.reshape(*batch, 3, 4), COORDS
    table = read_features(tmp_path / "clam.h5")
    assert (table.layout, table.unit, table.tile_size) == ("clam", "px", None)
    np.testing.assert_array_equal(table.features_TC, FEATURES)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"other": FEATURES}, "got other"),
        ({"features": FEATURES, "coords": COORDS[:2]}, "coords.shape"),
        ({"feats": FEATURES, "coords": COORDS}, "stride of 224"),
    ],
)
def test_strange_feature_file_is_refused_with_what_it_holds(
    tmp_path: Path, datasets: dict[str, np.ndarray], message: str
) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, data in datasets.items():
            file[name] = data
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / "x.h5")


def test_relevance_holds_raw_scores_of_tiles_and_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles, attention = rng.normal(size=(2, 3)).astype(np.float32), np.full(3, 1 / 3, dtype=np.float32)
    tokens, keep = rng.normal(size=(2, 3, 2, 2)).astype(np.float32), rng.random((3, 2, 2)) < 0.5
    of = ("a", "b"), tiles, attention, COORDS, GEOMETRY, "slide", "Some method"
    with relevance_table(tmp_path / "r.h5", *of, (2, 2)) as write:
        for batch in (np.array([0, 1]), np.array([2])):
            write(batch, tokens[:, batch], np.abs(tokens[0, batch]), keep[batch])
    with h5py.File(tmp_path / "r.h5") as file:
        assert file.attrs["method"].startswith("Some method: ")
        assert [name.decode() for name in file["classes"]] == ["a", "b"]
        np.testing.assert_array_equal(file["tiles/relevance"], tiles)
        np.testing.assert_array_equal(file["tiles/attention"], attention)
        np.testing.assert_array_equal(file["tokens/relevance"], tokens)
        np.testing.assert_array_equal(file["tokens/attention"], np.abs(tokens[0]))
        np.testing.assert_array_equal(file["tokens/keep"], keep)
        assert file["coords"].attrs["patch_size_level0"] == 257


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    def write() -> None:
        tiles = np.zeros((1, 3), dtype=np.float32)
        with relevance_table(tmp_path / "r.h5", ("a",), tiles, tiles[0], COORDS, GEOMETRY, "s", (2, 2)):
            raise RuntimeError("half-way")

    (tmp_path / "r.h5").write_text("old")
    with pytest.raises(RuntimeError, match="half-way"):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.h5"]
    assert (tmp_path / "r.h5").read_text() == "old"


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "x.txt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


PREDICTION = SlidePrediction(
    slide_id="one",
    prediction="a",
    scores={"a": 0.75, "b": 0.25},
    logits={"a": 1.0, "b": -0.1},
    model=ModelIdentity("m", "0123456789abcdef", ("a", "b"), True, "note"),
    slide=SlideFile("one.svs", 12, "aperio", 10, 20, 0.5, "metadata", None),
    tissue={"method": "saturation", "fraction": 0.3, "notes": []},
    settings={"masked": True},
    counts=SlideCounts(4, 2, 30, 34, 0),
    timings_s={"read": 0.1},
    versions={"torch": "2"},
)


def test_prediction_comes_back(tmp_path: Path) -> None:
    PREDICTION.write(tmp_path / "prediction.json")
    assert read_prediction(tmp_path / "prediction.json") == PREDICTION


def test_a_prediction_of_an_earlier_version_does_not_tell_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "prediction.json"
    PREDICTION.write(path)
    fields = json.loads(path.read_text())
    del fields["slide"]["reader"]
    path.write_text(json.dumps(fields))
    assert read_prediction(path).slide.reader == ""
    replace(PREDICTION, slide=replace(PREDICTION.slide, reader="openslide 4.0.1")).write(path)
    assert read_prediction(path).slide.reader == "openslide 4.0.1"


@pytest.mark.parametrize("fault", ["truncated", "key missing", "key unknown", "no object"])
def test_incomplete_prediction_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "prediction.json"
    PREDICTION.write(path)
    fields = json.loads(path.read_text())
    if fault == "truncated":
        path.write_text(path.read_text()[:100])
    elif fault == "key missing":
        path.write_text(json.dumps({name: value for name, value in fields.items() if name != "counts"}))
    elif fault == "key unknown":
        path.write_text(json.dumps({**fields, "extra": 1}))
    else:
        path.write_text("[]")
    with pytest.raises(ValueError, match="complete"):
        read_prediction(path)
