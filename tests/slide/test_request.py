"""The request: a field's metadata in one dataclass applies to the command line, prediction.json and finished slides."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.asked import asked_of, fields_of
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

OTHER = {
    "masked": False,
    "tokens": True,
    "method": "cdam",
    "check": False,
    "ink": "off",
    "force": True,
    "batch_size": 3,
    "workers": 1,
    "overwrite": True,
}


@pytest.mark.parametrize("name", [field.name for field in fields(RunSettings)])
def test_every_field_has_an_option_with_its_help_text(name: str) -> None:
    (asked,) = (asked_of(field) for field in fields(RunSettings) if field.name == name)
    text = CliRunner().invoke(app, ["infer", "--help"]).stdout
    assert any(line.startswith(f"  {asked.flag} ") for line in text.splitlines())
    assert "".join(asked.help.split()) in "".join(text.split())  # wherever its lines are broken


def test_every_recorded_field_is_in_prediction_json_in_order(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run_slides([SlideJob("disc", slide)], model, settings)
    record = json.loads((settings.out_dir / "disc" / "prediction.json").read_text())["settings"]
    ours = [field.name for field in fields_of(RunSettings) if asked_of(field).recorded]
    assert [name for name in record if name in ours] == ours
    assert {"mask", "device", "tile_px"} <= record.keys()


@pytest.mark.parametrize("name", OTHER)
def test_a_finished_slide_serves_another_request_only_where_the_field_says_so(
    model: SlideModel, slide: Path, settings: RunSettings, name: str
) -> None:
    (field,) = (field for field in fields(RunSettings) if field.name == name)
    serves = asked_of(field).serves
    given = {one.name: getattr(settings, one.name) for one in fields(settings)}
    (first,) = run_slides([SlideJob("disc", slide)], model, settings)
    (again,) = run_slides([SlideJob("disc", slide)], model, RunSettings(**{**given, name: OTHER[name]}))
    assert first.status == "ok"
    if name == "overwrite":
        assert again.status == "ok"
    elif serves is None or serves(given[name], OTHER[name]):
        assert again.status == "skipped", again.reason
    else:
        assert again.status == "failed"
        assert f"got {name}: {given[name]}" in again.reason


def test_a_slide_of_an_earlier_version_was_explained_by_cdam_without_a_check(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run_slides([SlideJob("disc", slide)], model, settings)
    path = settings.out_dir / "disc" / "prediction.json"
    prediction = json.loads(path.read_text())
    del prediction["settings"]["method"], prediction["settings"]["check"], prediction["maps"]
    path.write_text(json.dumps(prediction))
    (again,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert again.status == "failed"
    assert "got method: cdam" in again.reason
    old = replace(settings, method="cdam", check=False)
    (same,) = run_slides([SlideJob("disc", slide)], model, old)
    assert same.status == "skipped", same.reason


def test_settings_but_the_folder_are_given_by_name() -> None:
    kinds = {name: p.kind for name, p in inspect.signature(RunSettings).parameters.items()}
    assert kinds.pop("out_dir") is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}
