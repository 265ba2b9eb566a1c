"""Training on synthetic slides: samples follow inference's rules, and a few steps learn something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("openslide")
pytest.importorskip("maskattn._native")

from maskattn.demo import samples
from maskattn.demo.synthetic import make_slide, write_slide
from maskattn.demo.train import TrainingPlan, train
from maskattn.slide.grid import make_grid
from maskattn.slide.reader import SlideReader
from maskattn.slide.stream import stream_tiles
from maskattn.slide.tissue import find_tissue

TINY = TrainingPlan(tile_slides=3, tiles_per_slide=24, tile_steps=30, tile_batch=16, label_slides=6, label_steps=30)


@pytest.fixture(scope="module")
def sample() -> samples.SlideSample:
    return samples.sample_slide(3, label=2)


def test_training_sees_the_tiles_that_inference_sees(tmp_path: Path, sample: samples.SlideSample) -> None:
    with SlideReader(write_slide(make_slide(3, 2), tmp_path / "slide.tiff")) as reader:
        grid = make_grid(reader.info, find_tissue(reader), tile_px=128, token_px=16, spacing_um=1.0)
        tiles = torch.cat([batch.tiles_BCHW for batch in stream_tiles(reader, grid, batch_size=64)])
    # the file's coarse level is rounded twice on the way to the tissue finder: a border token may differ
    shared = grid.keep_HW & sample.grid.keep_HW
    assert shared.sum() >= 0.98 * max(grid.keep_HW.sum(), sample.grid.keep_HW.sum())
    of_file = tiles[torch.from_numpy(shared[grid.keep_HW])]
    of_memory = sample.tiles_TCHW[shared[sample.grid.keep_HW]]
    assert np.array_equal(of_file.numpy(), of_memory)
    tokens_differ = grid.token_keep_THW[shared[grid.keep_HW]] != sample.grid.token_keep_THW[shared[sample.grid.keep_HW]]
    assert tokens_differ.mean() < 0.01


def test_kinds_are_shares_and_name_the_lesion(sample: samples.SlideSample) -> None:
    assert sample.kinds_TKHW.sum(1) == pytest.approx(1.0, abs=1e-4)
    assert np.array_equal(sample.kinds_TKHW[:, samples.KINDS.index("high")], sample.lesion_THW)
    assert not sample.kinds_TKHW[:, samples.KINDS.index("low")].any()


def test_an_unmasked_sample_keeps_every_token() -> None:
    sample = samples.sample_slide(3, masked=False)
    assert sample.grid.keep_HW.all()
    assert sample.grid.token_keep_THW.all()
    assert sample.tiles_TCHW.shape == (256, 3, 128, 128)


def test_token_shares_count_what_lies_over_the_edge_as_empty() -> None:
    shares = samples.token_shares(np.ones((128, 136), bool))
    assert shares.shape == (8, 16)
    assert shares[:, :8] == pytest.approx(1.0)
    assert shares[:, 8] == pytest.approx(0.5, abs=0.01)
    assert not shares[:, 9:].any()


def test_a_few_steps_reduce_the_loss() -> None:
    _, losses = train(TINY, say=lambda text: None)
    assert len(losses.tiles) == TINY.tile_steps
    assert len(losses.labels) == TINY.label_steps
    assert np.mean(losses.tiles[-5:]) < 0.8 * np.mean(losses.tiles[:5])
    assert np.isfinite(losses.labels).all()


def test_a_seed_trains_the_same_weights() -> None:
    plan = TrainingPlan(tile_slides=1, tiles_per_slide=16, tile_steps=2, tile_batch=8, label_slides=2, label_steps=2)
    first, again = (train(plan, say=lambda text: None)[0].identity() for _ in range(2))
    assert first == again
