"""Each sink that is asked for gets every tile once, in order, and names all the files that it writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from runs import names

from maskattn.nn.slide_model import SlideModel
from maskattn.slide import tile_loop
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.sinks import SINKS, ExplainedSlide, ExplainedTiles


class Recorder:
    """A sink that remembers what it is given, and writes how many tiles came."""

    files = ("count.txt",)

    def __init__(self, fails: bool = False) -> None:
        self.slide: ExplainedSlide | None = None
        self.batches: list[ExplainedTiles] = []
        self.ended = ""
        self.fails = fails

    def is_asked_for(self, settings: RunSettings) -> bool:
        return settings.ink == "auto"

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[object]:
        self.slide = slide
        try:
            yield self.batches.append
        except BaseException as error:
            self.ended = type(error).__name__
            raise
        if self.fails:
            raise OSError("the drive is gone")
        self.ended = "whole"
        (folder / "count.txt").write_text(str(sum(len(batch.tiles_B) for batch in self.batches)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    added = Recorder()
    monkeypatch.setattr(tile_loop, "SINKS", (*SINKS, added))  # the one line that adds an output
    return added


@pytest.mark.parametrize("tokens", [False, True])
def test_a_sink_is_fed_every_tile_once_and_in_order(
    model: SlideModel, slide: Path, settings: RunSettings, recorder: Recorder, tokens: bool
) -> None:
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, tokens=tokens))
    assert outcome.status == "ok", outcome.reason
    found = recorder.slide
    assert found is not None
    T = outcome.prediction.counts.kept_tiles
    np.testing.assert_array_equal(np.concatenate([batch.tiles_B for batch in recorder.batches]), np.arange(T))
    assert max(len(batch.tiles_B) for batch in recorder.batches) == settings.batch_size
    np.testing.assert_array_equal(
        np.concatenate([batch.keep_Bhw for batch in recorder.batches]), found.grid.token_keep_THW
    )
    assert (found.coords_T2.shape, found.attention_T.shape) == ((T, 2), (T,))
    assert found.relevance_KT.shape == (2, T)
    assert found.scores == outcome.prediction.scores
    for batch in recorder.batches:
        assert (batch.relevance_KBhw is not None) == (batch.attention_Bhw is not None) == tokens
        if batch.relevance_KBhw is not None:
            assert batch.relevance_KBhw.shape == (2, *batch.keep_Bhw.shape)
    assert (settings.out_dir / "disc" / "count.txt").read_text() == str(T)


def test_a_sink_that_is_not_asked_for_is_not_opened(
    model: SlideModel, slide: Path, settings: RunSettings, recorder: Recorder
) -> None:
    (outcome,) = run_slides([SlideJob("disc", slide)], model, replace(settings, ink="off"))
    assert outcome.status == "ok", outcome.reason
    assert recorder.slide is None
    assert "count.txt" not in names(settings.out_dir / "disc")


def test_a_sink_that_fails_fails_the_slide_and_the_others_leave_nothing(
    model: SlideModel, slide: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, failing = Recorder(), Recorder(fails=True)
    monkeypatch.setattr(tile_loop, "SINKS", (before, *SINKS, failing))
    (outcome,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert outcome.status == "failed"
    assert "the drive is gone" in outcome.reason
    assert before.ended == "OSError"
    assert names(settings.out_dir) == {"summary.csv"}


EVERYTHING = {"geojson": "tiles", "ome_tiff": "both", "zarr": True, "scale": "run"}


@pytest.mark.skipif(importlib.util.find_spec("zarr") is None, reason="needs zarr")
def test_every_file_of_a_slide_is_named_by_one_sink(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    run_slides([SlideJob("disc", slide)], model, replace(settings, **EVERYTHING))
    written = names(settings.out_dir / "disc") - {"prediction.json"}
    for name in written:
        assert sum(any(fnmatchcase(name, pattern) for pattern in sink.files) for sink in SINKS) == 1, name
    for sink in SINKS:
        for pattern in sink.files:
            assert any(fnmatchcase(name, pattern) for name in written), pattern
