from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from maskattn.files import replacing
from maskattn.slide.layouts.tile_features import TileHeader
from maskattn.slide.prediction import (
    ModelIdentity,
    SlideCounts,
    SlideFile,
    SlidePrediction,
    read_prediction,
)
from maskattn.slide.tables import relevance_table

HEADER = TileHeader(
    slide_id="slide",
    patch_size_px=128,
    patch_size_lv0=257,
    spacing_um=1.0,
    width_px=2220,
    height_px=2967,
    magnification=20.0,
)
COORDS = np.array([[0, 0], [257, 0], [0, 257]])


def test_relevance_holds_raw_scores_of_tiles_and_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiles, attention = rng.normal(size=(2, 3)).astype(np.float32), np.full(3, 1 / 3, dtype=np.float32)
    tokens, keep = rng.normal(size=(2, 3, 2, 2)).astype(np.float32), rng.random((3, 2, 2)) < 0.5
    of = ("a", "b"), tiles, attention, COORDS, HEADER, "Some method"
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
        with relevance_table(tmp_path / "r.h5", ("a",), tiles, tiles[0], COORDS, HEADER, "Some method", (2, 2)):
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


def test_a_prediction_of_an_earlier_version_does_not_name_its_reader(tmp_path: Path) -> None:
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
