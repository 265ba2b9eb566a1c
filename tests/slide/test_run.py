"""Many slides: a failure stays that of one slide, finished slides are skipped, another request is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import OUTPUTS, Watch, names, statuses
from small_slides import SHAPE, small_model, write_slide

from maskattn.errors import OutputError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob, collect_jobs
from maskattn.slide.prediction import read_prediction
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.summary import read_summary

pytestmark = pytest.mark.usefixtures("one_thread")


def bad_jobs(folder: Path, slide: Path) -> list[SlideJob]:
    (folder / "text.svs").write_text("not a slide\n")
    write_slide(folder / "unspaced.tiff", spacing_um=None)
    write_slide(folder / "white.tiff", np.full((*SHAPE, 3), 245, dtype=np.uint8))
    Image.fromarray(np.full((30, 300), 255, dtype=np.uint8)).save(folder / "wrong.png")
    return [
        SlideJob("good", slide),
        SlideJob("text", folder / "text.svs"),
        SlideJob("unspaced", folder / "unspaced.tiff"),
        SlideJob("white", folder / "white.tiff"),
        SlideJob("mask", slide, mask_path=folder / "wrong.png"),
        *collect_jobs([folder / "missing.svs"]),
        SlideJob("implausible", slide, spacing_um=300.0),
        SlideJob("last", slide, spacing_um=1.0),
    ]


def test_each_broken_slide_fails_with_its_remedy_and_the_others_go_on(
    model: SlideModel, slide: Path, settings: RunSettings, tmp_path: Path
) -> None:
    outcomes = {o.slide_id: o for o in run_slides(bad_jobs(tmp_path, slide), model, settings)}
    assert [o.slide_id for o in outcomes.values() if o.status == "ok"] == ["good", "last"]
    for slide_id, words in {
        "text": "a text file that begins with",
        "unspaced": "--spacing-um",
        "white": "--mask",
        "mask": "300 × 30 px",
        "missing": "does not exist",
        "implausible": "300 from the manifest",
    }.items():
        assert outcomes[slide_id].status == "failed"
        assert words in outcomes[slide_id].reason
    rows = read_summary(settings.out_dir / "summary.csv")
    assert {slide_id: row["reason"] for slide_id, row in rows.items()} == {
        slide_id: outcome.reason for slide_id, outcome in outcomes.items()
    }
    assert names(settings.out_dir) == {"summary.csv", "good", "last"}


def test_override_of_the_spacing_outranks_manifest_and_file(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    job = SlideJob("disc", slide, spacing_um=0.9)
    (outcome,) = run_slides([job], model, replace(settings, spacing_um=0.8))
    assert outcome.prediction is not None
    assert (outcome.prediction.slide.spacing_um, outcome.prediction.slide.spacing_source) == (0.8, "override")


def test_summary_is_current_after_every_slide(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    progress = Watch(settings.out_dir)
    run_slides(
        [SlideJob("a", slide), SlideJob("b", slide, problem="no"), SlideJob("c", slide)], model, settings, progress
    )
    assert progress.summaries == [
        {"a": "ok"},
        {"a": "ok", "b": "failed"},
        {"a": "ok", "b": "failed", "c": "ok"},
    ]


def test_finished_slides_are_skipped_with_their_scores_and_others_stay_in_the_summary(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, settings)
    before = (settings.out_dir / "b" / "prediction.json").stat().st_mtime_ns
    outcomes = run_slides([SlideJob("b", slide), SlideJob("c", slide)], model, settings)
    assert statuses(outcomes) == {"b": "skipped", "c": "ok"}
    assert outcomes[0].prediction == read_prediction(settings.out_dir / "b" / "prediction.json")
    assert (settings.out_dir / "b" / "prediction.json").stat().st_mtime_ns == before
    rows = read_summary(settings.out_dir / "summary.csv")
    assert {slide_id: row["status"] for slide_id, row in rows.items()} == {"a": "ok", "b": "skipped", "c": "ok"}
    assert rows["b"]["score_benign"] == rows["c"]["score_benign"]


def test_overwrite_runs_again(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    run_slides([SlideJob("a", slide)], model, settings)
    (settings.out_dir / "a" / "features.h5").write_text("old")
    (outcome,) = run_slides([SlideJob("a", slide)], model, replace(settings, overwrite=True))
    assert outcome.status == "ok"
    assert read_features(settings.out_dir / "a" / "features.h5").layout == "trident"
    assert names(settings.out_dir) == {"a", "summary.csv"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": True}, "tokens: False"),
        ({"masked": False}, "masked: True"),
        ({"spacing_um": 0.5}, "spacing_um: 1.0"),
        ("model", "model: small"),
    ],
)
def test_outputs_of_another_request_are_not_passed_off_as_this_one(
    model: SlideModel, slide: Path, settings: RunSettings, change: object, words: str
) -> None:
    run_slides([SlideJob("a", slide)], model, settings)
    if isinstance(change, dict):
        settings = replace(settings, **change)
    else:
        model = small_model("other", seed=1)
    (outcome,) = run_slides([SlideJob("a", slide)], model, settings)
    assert outcome.status == "failed"
    assert words in outcome.reason
    assert "--overwrite" in outcome.reason
    assert names(settings.out_dir / "a") == OUTPUTS


def test_foreign_folder_is_never_touched(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    (settings.out_dir / "a").mkdir(parents=True)
    (settings.out_dir / "a" / "thesis.txt").write_text("years of work")
    (settings.out_dir / "b").write_text("a file")
    outcomes = run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, replace(settings, overwrite=True))
    assert statuses(outcomes) == {"a": "failed", "b": "failed"}
    assert (settings.out_dir / "a" / "thesis.txt").read_text() == "years of work"
    assert (settings.out_dir / "b").read_text() == "a file"


def test_strange_summary_is_not_overwritten(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    settings.out_dir.mkdir()
    (settings.out_dir / "summary.csv").write_text("patient,age\n")
    with pytest.raises(OutputError, match="move that file away"):
        run_slides([SlideJob("a", slide)], model, settings)
    assert (settings.out_dir / "summary.csv").read_text() == "patient,age\n"


@pytest.mark.parametrize(("change", "words"), [({"ink": "off"}, "ink: auto"), ({"force": False}, "force: True")])
def test_other_rules_for_ink_and_for_dark_slides_are_another_request(
    model: SlideModel, slide: Path, settings: RunSettings, change: dict[str, object], words: str
) -> None:
    settings = replace(settings, force="force" in change)
    run_slides([SlideJob("a", slide)], model, settings)
    (outcome,) = run_slides([SlideJob("a", slide)], model, replace(settings, **change))
    assert outcome.status == "failed"
    assert words in outcome.reason


def test_outputs_from_before_there_were_rules_for_ink_are_finished(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    (made,) = run_slides([SlideJob("a", slide)], model, settings)
    assert (made.prediction.settings["ink"], made.prediction.settings["force"]) == ("auto", False)
    path = settings.out_dir / "a" / "prediction.json"
    fields = json.loads(path.read_text())
    del fields["settings"]["ink"], fields["settings"]["force"]
    path.write_text(json.dumps(fields))
    (outcome,) = run_slides([SlideJob("a", slide)], model, settings)
    assert outcome.status == "skipped"
    (outcome,) = run_slides([SlideJob("a", slide)], model, replace(settings, force=True))
    assert outcome.status == "skipped", "a slide that passed without force passes with it"


def test_outcomes_of_a_run_share_what_is_equal_in_them(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    jobs = [SlideJob(name, slide) for name in "ab"]
    for outcomes in (run_slides(jobs, model, settings), run_slides(jobs, model, settings)):
        first, second = (one.prediction for one in outcomes)
        assert first is not None
        assert second is not None
        for name in ("model", "settings", "versions", "notes"):
            assert getattr(first, name) is getattr(second, name)
        assert first.slide_id != second.slide_id
