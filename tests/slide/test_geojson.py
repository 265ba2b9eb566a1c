"""relevance.geojson, as QuPath reads it, checked with json and shapely against relevance.h5."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import shapely
from runs import assert_refused
from small_slides import SHAPE

from maskattn.errors import SlideError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.manifest import SlideJob
from maskattn.slide.outlines.merging import merged, rings_of
from maskattn.slide.outlines.rules import parse_regions
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.sinks import ExplainedTiles
from maskattn.slide.sinks.geojson import GeoJson


def run(model: SlideModel, slide: Path, settings: RunSettings, **asked: Any) -> tuple[list[dict], h5py.File]:
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, **asked))
    assert outcome.status == "ok", outcome.reason
    folder = settings.out_dir / "disc"
    collection = json.loads((folder / "relevance.geojson").read_bytes())
    assert collection["type"] == "FeatureCollection"
    assert collection["maskattn"]["slide_id"] == "disc"
    return collection["features"], h5py.File(folder / "relevance.h5")


def of_kind(features: list[dict], kind: str) -> list[dict]:
    return [feature for feature in features if feature["properties"]["objectType"] == kind]


def test_every_feature_is_what_qupath_reads(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    features, _ = run(model, slide, settings, geojson="tokens", tokens=True, regions=("benign=50%",))
    assert {feature["properties"]["objectType"] for feature in features} == {"detection", "annotation"}
    assert len({feature["id"] for feature in features}) == len(features)
    height, width = SHAPE
    for feature in features:
        assert feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        polygon = shapely.geometry.shape(feature["geometry"])
        assert polygon.geom_type == "Polygon"
        assert polygon.is_valid
        assert polygon.area > 0
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
        left, top, right, bottom = polygon.bounds
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        properties = feature["properties"]
        assert all(type(value) in (int, float) for value in properties["measurements"].values())
        if "classification" in properties:
            assert properties["classification"]["name"] in model.config.classes
            assert len(properties["classification"]["color"]) == 3
            assert all(type(part) is int and 0 <= part < 256 for part in properties["classification"]["color"])


def test_tiles_have_the_tables_numbers_at_the_tables_positions(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    features, table = run(model, slide, settings, geojson="tiles")
    coords, relevance, attention = table["coords"][:], table["tiles/relevance"][:], table["tiles/attention"][:]
    assert len(features) == len(coords)
    side = int(table["coords"].attrs["patch_size_level0"])
    scores = json.loads((settings.out_dir / "disc" / "prediction.json").read_text())["scores"]
    for feature, (x, y), values, share in zip(features, coords.tolist(), relevance.T, attention, strict=True):
        assert feature["properties"]["objectType"] == "tile"
        box = shapely.geometry.shape(feature["geometry"]).bounds
        assert box == (x, y, min(x + side, SHAPE[1]), min(y + side, SHAPE[0]))
        measured = feature["properties"]["measurements"]
        np.testing.assert_allclose([measured["relevance: benign"], measured["relevance: low/high"]], values, rtol=1e-5)
        assert measured["attention"] == pytest.approx(share, rel=1e-5)
        assert measured["probability: benign"] == pytest.approx(scores["benign"], rel=1e-5)
        of_class = feature["properties"].get("classification", {"name": None})["name"]
        assert of_class == (model.config.classes[values.argmax()] if values.max() > 0 else None)


def test_tokens_are_the_kept_ones_with_their_own_numbers(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    features, table = run(model, slide, settings, geojson="tokens", tokens=True)
    keep, relevance = table["tokens/keep"][:], table["tokens/relevance"][:]
    tile, row, column = np.nonzero(keep)
    assert len(features) == len(tile)
    step = int(table["coords"].attrs["patch_size_level0"]) / keep.shape[1]
    corners = table["coords"][:][tile] + np.stack([column, row], axis=1) * step
    found = np.array([shapely.geometry.shape(feature["geometry"]).bounds[:2] for feature in features])
    np.testing.assert_array_equal(found, corners)
    measured = [feature["properties"]["measurements"]["relevance: low/high"] for feature in features]
    np.testing.assert_allclose(measured, relevance[1, tile, row, column], rtol=1e-5)
    weight = [feature["properties"]["measurements"]["attention"] for feature in features]
    expected = table["tokens/attention"][:][tile, row, column] * table["tiles/attention"][:][tile]
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tiles", "tokens"])
def test_regions_cover_what_reaches_the_threshold_and_nothing_else(
    model: SlideModel, slide: Path, settings: RunSettings, kind: str
) -> None:
    features, _ = run(model, slide, settings, geojson=kind, tokens=True, regions=("benign=70%", "low/high=0.0"))
    objects = [f for f in features if f["properties"]["objectType"] != "annotation"]
    regions = of_kind(features, "annotation")
    for name, least in (("benign", None), ("low/high", 0.0)):
        values = np.array([f["properties"]["measurements"][f"relevance: {name}"] for f in objects])
        threshold = max(0.0, np.percentile(values, 70)) if least is None else least
        reaching = [
            shapely.geometry.shape(f["geometry"]) for f, v in zip(objects, values, strict=True) if v >= threshold
        ]
        mine = [f for f in regions if f["properties"]["classification"]["name"] == name]
        polygons = [shapely.geometry.shape(f["geometry"]) for f in mine]
        assert shapely.union_all(reaching).symmetric_difference(shapely.union_all(polygons)).area < 1e-6
        assert all(f["properties"]["isLocked"] for f in mine)
        measured = [f["properties"]["measurements"] for f in mine]
        assert sum(m[kind] for m in measured) == len(reaching)
        assert sum(m[f"relevance: {name}"] for m in measured) == pytest.approx(
            values[values >= threshold].sum(), rel=1e-4
        )


def test_the_same_map_gives_the_same_file_in_batches_of_any_size(
    model: SlideModel, slide: Path, settings: RunSettings, tmp_path: Path
) -> None:
    found = []
    for size in (3, 8):
        one = replace(settings, out_dir=tmp_path / str(size), batch_size=size)
        features, _ = run(model, slide, one, geojson="tiles")
        found.append([(f["id"], f["geometry"]) for f in features])
    assert found[0] == found[1]


def test_a_region_with_a_hole_keeps_it_and_squares_that_meet_at_a_corner_stay_valid() -> None:
    rows, columns = np.nonzero(np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]))
    third = 100 / 3
    boxes = np.stack([columns * third, rows * third, (columns + 1) * third, (rows + 1) * third], axis=1)
    ring, corner = merged(boxes)
    assert len(rings_of(ring)) == 2
    assert ring.area == pytest.approx(8 * third**2)
    assert corner.bounds == (100, 100, 4 * third, 4 * third)
    assert merged(np.empty((0, 4))) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"geojson": "tokens"}, "got no --tokens"),
        ({"regions": ("benign=0",)}, "got 'benign' and no such file"),
        ({"geojson": "tiles", "regions": ("benign",)}, "got 'benign'; write for example"),
        ({"geojson": "tiles", "regions": ("benign=nan",)}, "must be CLASS=VALUE"),
        ({"geojson": "tiles", "regions": ("benign=101%",)}, "must be CLASS=VALUE"),
        ({"geojson": "tiles", "regions": ("=1",)}, "must be CLASS=VALUE"),
        ({"geojson": "tiles", "regions": ("benign=1", "benign=2")}, "got 2 for 'benign'"),
        ({"geojson": "tiles", "regions": ("bening=1",)}, "did you mean 'benign'?"),
        ({"geojson": "tiles", "regions": ("tumour=1",)}, "there are 'benign', 'low/high'"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    model: SlideModel, slide: Path, settings: RunSettings, given: dict[str, Any], words: str
) -> None:
    assert_refused(slide, model, replace(settings, **given), words)


def test_a_class_may_have_signs_of_equality_in_its_name() -> None:
    (rule,) = parse_regions(["grade>=3=2.5e-3"])
    assert (rule.class_name, rule.value, rule.is_percentile) == ("grade>=3", 0.0025, False)


def test_a_finished_slide_with_a_geojson_serves_a_run_without(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run(model, slide, settings, geojson="tiles", regions=("benign=90%",))
    for asked, status in (({}, "skipped"), ({"geojson": "tiles"}, "skipped"), ({"geojson": "tokens"}, "failed")):
        (again,) = run_slides(
            [SlideJob("disc", slide)], model, replace(settings, tokens="tokens" in asked.values(), **asked)
        )
        assert again.status == status, again.reason


def test_runs_on_features_alone_write_tiles_as_there_are_no_token_maps(tmp_path: Path) -> None:
    asked = RunSettings(tmp_path, tokens=True, geojson="tokens", regions=("a=0",))
    header = SimpleNamespace(width_px=None, height_px=None, on_level0=True)
    slide: Any = SimpleNamespace(
        slide_id="s",
        header=header,
        grid=SimpleNamespace(tile_lv0=100, width_px=0, height_px=0),
        model=SimpleNamespace(name="m", classes=("a",)),
        scores={"a": 1.0},
        method="CDAM",
        coords_T2=np.array([[0, 0], [100, 0]]),
        relevance_KT=np.array([[0.5, -0.5]]),
        attention_T=np.zeros(2),
        with_tokens=False,
        settings=asked,
    )
    with GeoJson().open(tmp_path, slide) as take:
        take(ExplainedTiles(np.arange(2), np.ones((2, 1, 1), bool)))
    first, second, region = json.loads((tmp_path / "relevance.geojson").read_bytes())["features"]
    assert [one["properties"]["objectType"] for one in (first, second, region)] == ["tile", "tile", "annotation"]
    assert shapely.geometry.shape(second["geometry"]).bounds == (100, 0, 200, 100)
    assert "attention" not in first["properties"]["measurements"]
    header.on_level0 = False
    with pytest.raises(SlideError, match="must be in pixels of level 0"), GeoJson().open(tmp_path, slide):
        pass
