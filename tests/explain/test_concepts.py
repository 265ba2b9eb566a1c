from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from small_vits import random_vit, sample

from maskattn.explain import CDAM, Concept, concepts
from maskattn.nn import VisionTransformer


def headless(model: VisionTransformer, **arguments: object) -> VisionTransformer:
    bare = random_vit(num_classes=0, **arguments)
    bare.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("head.")})
    return bare


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_concept_is_the_mean_feature_and_its_score_a_similarity(variant, similarity):
    model, (x, keep) = random_vit(**variant), sample(3)
    bare = headless(model, **variant)
    concept = Concept.from_images(model, x, keep, similarity=similarity, batch_size=2)
    mean = bare(x, keep).mean(dim=0).detach()
    torch.testing.assert_close(concept.direction, mean)
    score = {"dot": lambda z: z @ mean, "cosine": lambda z: F.cosine_similarity(z, mean[None])}[similarity]
    images, kept = sample()
    torch.testing.assert_close(concept(bare(images, kept)), score(bare(images, kept)))
    torch.testing.assert_close(CDAM(model).attribute(images, concept, kept), CDAM(bare).attribute(images, score, kept))


def test_several_concepts_are_explained_at_once():
    model, (x, keep) = random_vit(), sample()
    directions = torch.randn(3, 24, dtype=torch.float64)
    maps = CDAM(model).attribute(x, Concept(directions), keep)
    assert maps.shape == (2, 3, 4, 4)
    torch.testing.assert_close(maps[:, 1], CDAM(model).attribute(x, Concept(directions[1]), keep))


def test_wrong_concepts_are_named():
    model, (x, _) = random_vit(), sample()
    with pytest.raises(ValueError, match=r"\(C,\) or \(M, C\)"):
        Concept(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="similarity='euclid'"):
        Concept(torch.zeros(24), "euclid")
    with pytest.raises(ValueError, match="has 5 channels"):
        CDAM(model).attribute(x, Concept(torch.zeros(5)))
    with pytest.raises(ValueError, match="B=0"):
        Concept.from_images(model, x[:0])


def test_the_docstrings_example_runs():
    result = doctest.testmod(concepts, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
