"""A GPU is not waited for at every batch: counted where the machine has none, with its clock and events replaced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_slides import write_slide
from test_extraction import small_encoder

from maskattn.nn.slide_model import SlideModel
from maskattn.slide import extraction, pipeline
from maskattn.slide.device_copies import HostCopies, to_device
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.slide_run import Stages

pytestmark = pytest.mark.usefixtures("one_thread")


def test_copies_are_equal_and_apart_from_the_gradient() -> None:
    values = torch.arange(6.0, dtype=torch.float64, requires_grad=True).reshape(2, 3)
    first, second = HostCopies(values, values[0] * 2).arrays()
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(second, [0, 2, 4])
    rows = np.arange(10)[::-2]
    assert to_device(rows, torch.device("cpu")).tolist() == rows.tolist()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the stages of a slide wait for, as if the model were on a GPU."""
    counts: Counter[str] = Counter()

    class Event:
        def record(self, stream: object) -> None: ...

        def synchronize(self) -> None:
            counts["for the batch before"] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: counts.update(["for all"]))
    for module in (pipeline, extraction):
        monkeypatch.setattr(module, "Stages", lambda _: Stages(torch.device("cuda")))
    return counts


def test_prediction_with_token_maps_waits_for_all_work_as_often_with_many_batches_as_with_one(
    model: SlideModel, slide: Path, tmp_path: Path, waits: Counter[str]
) -> None:
    found = {}
    for batch_size in (1, 100):
        waits.clear()
        settings = RunSettings(tmp_path / str(batch_size), batch_size=batch_size, tokens=True)
        pipeline.predict_slide(SlideJob("disc", slide), model, settings)
        found[batch_size] = dict(waits)
    assert found[1]["for all"] == found[100]["for all"]
    assert found[1]["for the batch before"] > found[100].get("for the batch before", 0)


def test_extraction_waits_for_all_work_as_often_with_many_batches_as_with_one(
    tmp_path: Path, waits: Counter[str]
) -> None:
    slide, found = write_slide(tmp_path / "disc.tiff"), {}
    for batch_size in (1, 100):
        waits.clear()
        settings = ExtractSettings(tmp_path / str(batch_size), batch_size=batch_size)
        record = extraction.extract_slide(SlideJob("disc", slide), small_encoder(), settings)
        assert record.tiles > 10
        found[batch_size] = waits["for all"]
    assert found[1] == found[100]
