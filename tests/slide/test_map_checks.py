"""Checks of a slide's maps: in its prediction, the summary, the titles of its pictures, and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from maskattn.cli.reporting import map_warnings
from maskattn.explain.map_check import SHARES, MapCheck
from maskattn.explain.methods import DEFAULT_METHOD, METHODS
from maskattn.nn.slide_model import SlideModel
from maskattn.slide import pipeline
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import read_prediction
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.sinks import heatmaps
from maskattn.slide.summary import read_summary


def test_a_prediction_records_each_maps_method_sum_and_effect_of_dropping_tiles(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    (outcome,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert outcome.status == "ok", outcome.reason
    folder = settings.out_dir / "disc"
    maps = read_prediction(folder / "prediction.json").maps
    assert list(maps) == ["benign", "low/high"]
    with h5py.File(folder / "relevance.h5") as file:
        relevance_KT = torch.from_numpy(file["tiles/relevance"][:])
    for index, of_map in enumerate(maps.values()):
        assert of_map["method"] == METHODS[DEFAULT_METHOD].title
        assert of_map["sum_of_tiles"] == pytest.approx(float(relevance_KT[index].sum()), abs=1e-5)
        accounted = of_map["sum_of_tiles"] + of_map["on_class_token"] + of_map["gap"]
        assert accounted == pytest.approx(of_map["score_less_baseline"], abs=1e-4)
        assert abs(of_map["gap"]) < 1e-2 * max(1.0, abs(of_map["score_less_baseline"]))
    embeddings = torch.from_numpy(read_features(folder / "features.h5").features_TC)
    T, grid = len(embeddings), (1, len(embeddings))
    if model.slide_encoder.pos_embed is None:  # a row of tiles is then as good as their places
        whole = model(embeddings, torch.ones(grid, dtype=torch.bool))[0]
        order = relevance_KT[0].argsort(descending=True, stable=True)
        for share, drop in zip(SHARES, maps["benign"]["drop_most_relevant"], strict=True):
            left = order[max(1, round(share * T)) :].sort().values
            without = model(embeddings[left], torch.ones(1, len(left), dtype=torch.bool))[0]
            assert drop == pytest.approx(float(whole - without), abs=1e-4)
    row = read_summary(settings.out_dir / "summary.csv")["disc"]
    assert row["map_check"] == maps[outcome.prediction.prediction]["map_check"]


@pytest.mark.parametrize("verdict", ["passed", "weak", "contradicts"])
def test_titles_summary_and_the_last_lines_say_which_maps_did_not_pass(
    model: SlideModel, slide: Path, settings: RunSettings, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(pipeline, "check_tokens", lambda *given: [MapCheck(verdict)] * 2)
    monkeypatch.setattr(heatmaps, "begin_heatmap", lambda *given: lambda: titles.append(given[3]))
    outcomes = run_slides([SlideJob("disc", slide)], model, settings)
    assert read_summary(settings.out_dir / "summary.csv")["disc"]["map_check"] == verdict
    said = [f"map check: {verdict}" in title for title in titles]
    assert said == ([False] * 3 if verdict == "passed" else [True, True, False])
    lines = map_warnings(outcomes)
    assert [line.split(":")[0] for line in lines] == ([] if verdict == "passed" else [f"map check {verdict}"])
    assert all("disc" in line for line in lines)


def test_without_the_check_nothing_is_dropped_and_nothing_is_said(
    model: SlideModel, slide: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "check_tokens", None)
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, check=False))
    assert outcome.status == "ok", outcome.reason
    assert {of_map["map_check"] for of_map in outcome.prediction.maps.values()} == {"not asked for"}
    assert "check" not in outcome.prediction.timings_s
    assert map_warnings([outcome]) == []


def test_a_method_that_explains_no_slide_models_is_refused(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    with pytest.raises(ValueError, match=r"slide model must be one of cdam, .*, got method='rise'"):
        run_slides([SlideJob("disc", slide)], model, replace(settings, method="rise"))
