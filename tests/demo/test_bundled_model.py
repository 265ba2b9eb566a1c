"""The bundled weights: small, loadable, right on fresh slides, and with a class map that finds the lesion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("openslide")
pytest.importorskip("safetensors")
pytest.importorskip("maskattn._native")
pytest.importorskip("sklearn")

from sklearn.metrics import average_precision_score

from maskattn.demo.samples import SlideSample, sample_slide
from maskattn.demo.synthetic import CLASSES
from maskattn.demo.train import (
    BUNDLED_MODEL,
    BUNDLED_WEIGHTS,
    FIRST_TRAINING_SEED,
    TrainingPlan,
    demo_card,
    model_config,
)
from maskattn.explain.hierarchical import HierarchicalCDAM, RelevanceMap
from maskattn.nn.slide_model import SlideModel
from maskattn.nn.slide_models.card import read_card

FRESH_SEEDS = (2024, 2025, 2026)
MIN_AVERAGE_PRECISION = 0.45  # the mean over fresh slides is 0.63 (bench/results/demo_figures.md)


@pytest.fixture(scope="module")
def model() -> SlideModel:
    return SlideModel.load(BUNDLED_WEIGHTS)


@pytest.fixture(scope="module")
def explained(model: SlideModel) -> list[tuple[SlideSample, RelevanceMap]]:
    pairs = []
    for label, seed in enumerate(FRESH_SEEDS):
        sample = sample_slide(seed, label=label)
        with torch.no_grad():
            embeddings = model.encode_tiles(
                torch.from_numpy(sample.tiles_TCHW), torch.from_numpy(sample.grid.token_keep_THW)
            )
        pairs.append((sample, HierarchicalCDAM(model).tiles(embeddings, torch.from_numpy(sample.grid.keep_HW))))
    return pairs


def test_the_weights_are_at_most_two_megabytes() -> None:
    assert BUNDLED_WEIGHTS.stat().st_size <= 2e6


def test_the_model_is_a_folder_whose_card_is_that_of_the_weights(model: SlideModel) -> None:
    assert read_card(BUNDLED_MODEL) == demo_card(model)
    assert (BUNDLED_MODEL / "README.md").read_text() == demo_card(model).markdown()
    assert model.identity().startswith("4e0345eb9164c023")  # as predictions of earlier versions have it


def test_the_weights_say_that_they_are_a_demonstration(model: SlideModel) -> None:
    assert model.config == model_config(masked=True)
    assert model.config.demonstration
    assert "synthetic" in model.config.note


def test_the_test_slides_were_never_trained_on() -> None:
    assert max(FRESH_SEEDS) < FIRST_TRAINING_SEED <= TrainingPlan().first_slide_seed


def test_fresh_slides_get_the_right_class(explained: list[tuple[SlideSample, RelevanceMap]]) -> None:
    assert [CLASSES[int(relevance.logits_K.argmax())] for _, relevance in explained] == list(CLASSES)


@pytest.mark.parametrize("label", [1, 2])
def test_the_class_map_finds_the_lesion(
    model: SlideModel, explained: list[tuple[SlideSample, RelevanceMap]], label: int
) -> None:
    sample, relevance = explained[label]
    keep = torch.from_numpy(sample.grid.token_keep_THW)
    maps = HierarchicalCDAM(model).tokens(torch.from_numpy(sample.tiles_TCHW), keep, relevance.gradient_KTC)
    kept = sample.grid.token_keep_THW
    lesion = sample.lesion_THW[kept] >= 0.5
    precision = average_precision_score(lesion, maps.relevance_KBHW[label].numpy()[kept])
    assert precision > MIN_AVERAGE_PRECISION
    assert precision - np.mean(lesion) > 0.3  # a random map has the lesion's share of the tissue
    assert not maps.relevance_KBHW[:, ~keep].any()
    assert not maps.attention_BHW[~keep].any()
