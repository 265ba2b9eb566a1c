"""Batches hold as many tiles as have a number of kept tokens together, and the features are the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_extraction import CARD, extract, features_file, small_encoder
from torch import nn

from maskattn.errors import ManifestError
from maskattn.nn import TileEncoder
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.batch_sizes import equal_batches, sizes_of_batches
from maskattn.slide.extraction_loop import ExtractionLoop
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.slide_run import SlideRun

pytestmark = pytest.mark.usefixtures("one_thread")


def keep_of(*kept: int) -> np.ndarray:
    """Masks of tiles of 16 tokens that keep so many of them."""
    return np.stack([(np.arange(16) < number).reshape(4, 4) for number in kept])


@pytest.mark.parametrize(
    ("most", "kept", "sizes"),
    [
        (20, (5, 5, 10, 1, 16, 16, 4), [3, 2, 2]),
        (20, (16,) * 4, [1, 1, 1, 1]),
        (40, (16,) * 5, [2, 2, 1]),
        (3, (16, 1, 1, 1, 16), [1, 1, 1, 1, 1]),
        (16, (1,) * 10, [4, 4, 2]),
        (16, (0, 0, 0, 16), [4]),
    ],
)
def test_a_batch_holds_the_tiles_whose_tokens_fit_and_at_most_four_times_as_many_as_full_ones(
    most: int, kept: tuple[int, ...], sizes: list[int], tmp_path: Path
) -> None:
    settings = RunSettings(tmp_path, tokens_per_batch=most)
    assert sizes_of_batches(settings, len(kept), keep_of(*kept), 16) == sizes


def test_without_a_mask_every_token_counts(tmp_path: Path) -> None:
    assert sizes_of_batches(RunSettings(tmp_path, tokens_per_batch=50), 8, None, 16) == [3, 3, 2]


def test_without_the_option_batches_are_equal(tmp_path: Path) -> None:
    settings = RunSettings(tmp_path, batch_size=3)
    assert sizes_of_batches(settings, 7, keep_of(*range(7)), 16) == equal_batches(7, 3) == [3, 3, 1]
    assert sizes_of_batches(settings, 0, None, 16) == equal_batches(0, 3) == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("token_mask", ["none", "tissue"])
def test_features_are_those_of_batches_by_tiles(
    slide: Path, tmp_path: Path, token_mask: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = small_encoder()
    by_tiles = extract(slide, encoder, tmp_path / "a", token_mask=token_mask, min_tissue=0)
    tokens: list[int] = []
    encode = ExtractionLoop._encode

    def recorded(loop: ExtractionLoop, batch: object) -> object:
        before = loop.kept_tokens
        encoded = encode(loop, batch)
        tokens.append(loop.kept_tokens - before)
        return encoded

    monkeypatch.setattr(ExtractionLoop, "_encode", recorded)
    given = {"token_mask": token_mask, "min_tissue": 0, "workers": workers}
    by_tokens = extract(slide, encoder, tmp_path / "b", tokens_per_batch=100, **given)
    assert by_tokens.record is not None, by_tokens.reason
    assert by_tokens.record.settings["tokens_per_batch"] == 100
    assert sum(tokens) == by_tokens.record.kept_tokens
    assert max(tokens) <= 100
    assert all(one + other > 100 - 16 for one, other in pairwise(tokens))
    a, b = (
        read_features(features_file(tmp_path / name, outcome)) for name, outcome in (("a", by_tiles), ("b", by_tokens))
    )
    assert np.array_equal(a.coords_T2, b.coords_T2)
    np.testing.assert_allclose(a.features_TC, b.features_TC, rtol=1e-4, atol=1e-5)


def test_predictions_and_token_maps_are_those_of_batches_by_tiles(
    model: SlideModel, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    move = SlideRun._move

    def recorded(run: SlideRun, *arguments: object) -> object:
        for batch in move(run, *arguments):
            read.append(int(batch.keep_BHW.count_nonzero()))
            yield batch

    (by_tiles,) = run_slides([SlideJob("disc", slide)], model, RunSettings(tmp_path / "a", tokens=True))
    monkeypatch.setattr(SlideRun, "_move", recorded)
    settings = RunSettings(tmp_path / "b", tokens=True, tokens_per_batch=60)
    (by_tokens,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert by_tiles.prediction is not None
    assert by_tokens.prediction is not None, by_tokens.reason
    assert by_tokens.prediction.logits == pytest.approx(by_tiles.prediction.logits, rel=1e-4)
    assert sum(read) == 2 * by_tokens.prediction.counts.kept_tokens  # once for the scores, once for the maps
    assert len(read) > 2
    assert max(read) <= 60


def test_a_finished_slide_serves_a_request_for_other_batches(slide: Path, tmp_path: Path) -> None:
    encoder = small_encoder()
    assert extract(slide, encoder, tmp_path, tokens_per_batch=100).status == "ok"
    assert extract(slide, encoder, tmp_path, batch_size=7).status == "skipped"


def test_tiles_and_tokens_at_once_and_encoders_without_tokens_are_refused(
    slide: Path, model: SlideModel, tmp_path: Path
) -> None:
    swin = TileEncoder(nn.Identity(), replace(CARD, pooling="own", why_not="it is a Swin transformer"), 3)
    with pytest.raises(ManifestError, match="got --batch-size 8 and --tokens-per-batch 100; give one of the two"):
        extract(slide, small_encoder(), tmp_path / "out", batch_size=8, tokens_per_batch=100)
    with pytest.raises(ManifestError, match="got --batch-size 8 and --tokens-per-batch 100; give one of the two"):
        run_slides([SlideJob("disc", slide)], model, RunSettings(tmp_path / "out", batch_size=8, tokens_per_batch=100))
    with pytest.raises(ManifestError, match="packed vision transformer, got small: it is a Swin transformer"):
        extract(slide, swin, tmp_path / "out", tokens_per_batch=100)
    assert not (tmp_path / "out").exists()
