"""Pictures of a run on one scale: drawn when all slides are done, and anew when slides are added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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


def test_a_disk_that_is_full_at_the_end_is_told_and_finished_slides_stay(
    model: SlideModel, jobs: list[SlideJob], settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_scale, "write_heatmap", full)
    with pytest.raises(OutputError, match="No space left on device; free space and run it again"):
        run_slides(jobs[:1], model, replace(settings, scale="run"))
    assert "prediction.json" in names(settings.out_dir / "s0")
