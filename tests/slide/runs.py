"""Helpers for tests of runs: a folder's contents, each slide's outcome, and a progress object that interferes."""

from __future__ import annotations

from collections.abc import Callable, Sized
from pathlib import Path

import pytest

from maskattn.errors import ManifestError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import SlideOutcome
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.summary import read_summary

OUTPUTS = {
    *("attention.png", "features.h5", "heatmap_benign.png", "heatmap_low_high.png", "prediction.json", "relevance.h5")
}

# Requests about areas, and the messages with which they are refused.
AREAS_WITHOUT_EFFECT = [
    ({"mask_classes": ("Tumor",)}, "--mask-class names classes of outlines, got 'Tumor' and no outlines"),
    ({"roi_classes": ("Tumor",)}, "give them with --roi, or"),
    ({"exclude_classes": ("Tumor",)}, "give them with --exclude, or"),
    ({"roi": Path("nowhere.geojson")}, "got nowhere.geojson, which does not exist"),
]


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def statuses(outcomes: list[SlideOutcome]) -> dict[str, str]:
    return {outcome.slide_id: outcome.status for outcome in outcomes}


def lengths_given_to(kind: type, method: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the first argument in each call of a method, which is how much is held at a time."""
    lengths: list[int] = []
    called = getattr(kind, method)

    def counted(self: object, given: Sized, *rest: object) -> object:
        lengths.append(len(given))
        return called(self, given, *rest)

    monkeypatch.setattr(kind, method, counted)
    return lengths


def assert_refused(slide: Path, model: SlideModel, settings: RunSettings, words: str) -> None:
    """Check that a run of settings that would have no effect is refused before it writes anything."""
    with pytest.raises(ManifestError) as raised:
        run_slides([SlideJob("disc", slide)], model, settings)
    assert words in str(raised.value)
    assert not settings.out_dir.exists()


class Watch:
    """Progress that keeps the summary as it is after each slide, and acts at the first batch of one slide's tiles."""

    def __init__(self, out: Path, slide_id: str = "", action: Callable[[], None] = lambda: None) -> None:
        self.out, self.slide_id, self.action, self.current = out, slide_id, action, ""
        self.summaries: list[dict[str, str]] = []

    def slide_started(self, job: SlideJob) -> None:
        self.current = job.slide_id

    def tiles_done(self, done: int, total: int) -> None:
        assert 0 < done <= total
        if self.current == self.slide_id:
            self.action()

    def slide_ended(self, outcome: SlideOutcome) -> None:
        rows = read_summary(self.out / "summary.csv")
        self.summaries.append({slide_id: row["status"] for slide_id, row in rows.items()})
