"""Pictures of a run on one scale: drawn when all slides are done, and again when slides are added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from runs import names
from small_slides import tissue_image, write_slide

from maskattn.errors import OutputError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide import run_scale
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

Drawn = dict[tuple[str, str], tuple[float, float]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The limits of each picture that was drawn last, by slide and file."""
    limits: Drawn = {}
    write = run_scale.write_heatmap

    def remember(path: Path, *given: Any) -> None:
        limits[path.parent.name, path.name] = given[-1]
        write(path, *given)

    monkeypatch.setattr(run_scale, "write_heatmap", remember)
    return limits


@pytest.fixture
def jobs(tmp_path: Path) -> list[SlideJob]:
    return [
        SlideJob(f"s{seed}", write_slide(tmp_path / f"s{seed}.tiff", tissue_image(seed=seed)[:, : 560 - 80 * seed]))
        for seed in range(3)
    ]


def kept_limits(out: Path, slide_ids: list[str]) -> np.ndarray:
    return np.stack([np.load(out / slide_id / "heatmaps.npz")["limits"] for slide_id in slide_ids])


def test_every_slide_has_the_widest_scale_of_its_class(
    model: SlideModel, jobs: list[SlideJob], settings: RunSettings, drawn: Drawn
) -> None:
    asked = replace(settings, scale="run")
    # The second run adds a slide, and skips the others.
    for some, statuses in ((jobs[:2], ["ok", "ok"]), (jobs, ["skipped", "skipped", "ok"])):
        drawn.clear()
        assert [one.status for one in run_slides(some, model, asked)] == statuses
        ids = [job.slide_id for job in some]
        widest = kept_limits(settings.out_dir, ids)[:, :, 1].max(axis=0)
        for slide_id in ids:
            files = ["heatmap_benign.png", "heatmap_low_high.png", "attention.png"]
            assert [drawn[slide_id, file][1] for file in files] == widest.tolist()
            assert drawn[slide_id, "heatmap_benign.png"][0] == -widest[0]
            assert drawn[slide_id, "attention.png"][0] == 0.0


def test_without_it_nothing_is_kept_and_no_picture_is_drawn_twice(
    model: SlideModel, jobs: list[SlideJob], settings: RunSettings, drawn: Drawn
) -> None:
    run_slides(jobs[:1], model, settings)
    assert drawn == {}
    assert "heatmaps.npz" not in names(settings.out_dir / "s0")


def test_a_disk_that_is_full_at_the_end_is_reported_and_finished_slides_stay(
    model: SlideModel, jobs: list[SlideJob], settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_scale, "write_heatmap", full)
    with pytest.raises(OutputError, match="No space left on device; free space and run it again"):
        run_slides(jobs[:1], model, replace(settings, scale="run"))
    assert "prediction.json" in names(settings.out_dir / "s0")


def test_smoothing_is_of_the_pictures_alone_and_they_say_so(
    model: SlideModel, jobs: list[SlideJob], settings: RunSettings, tmp_path: Path
) -> None:
    kept, tables = [], []
    for smooth in (False, True):
        asked = replace(settings, out_dir=tmp_path / f"{smooth}", scale="run", smooth=smooth, tokens=True)
        (outcome,) = run_slides(jobs[:1], model, asked)
        assert outcome.status == "ok", outcome.reason
        with np.load(asked.out_dir / "s0" / "heatmaps.npz") as maps:
            kept.append(maps["values"])
            assert ("smoothed in the drawing" in str(maps["pictures"])) == smooth
        with h5py.File(asked.out_dir / "s0" / "relevance.h5") as table:
            tables.append(table["tokens/relevance"][:])
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(np.isnan(kept[0]), np.isnan(kept[1]))
    steps = [np.nanmax(np.abs(np.diff(values, axis=2))) for values in kept]
    assert steps[1] < 0.5 * steps[0]
