"""Zero-shot scores of a slide: pooled by hand, complete over tiles, and over tokens to the path's gap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_vits import random_vit, sample

from maskattn.explain.integrated import IntegratedCDAM
from maskattn.explain.text_concepts import TextConcepts
from maskattn.explain.zero_shot import ZeroShotSlide


def concepts() -> TextConcepts:
    return TextConcepts(("gland", "fat"), torch.randn(2, 4, dtype=torch.float64), 10.0)


@pytest.mark.parametrize("best", [None, 1, 3, 100])
def test_the_slides_score_is_the_mean_of_its_best_tiles_and_relevance_sums_to_it(best):
    words, z = concepts(), torch.randn(7, 4, dtype=torch.float64)
    found = ZeroShotSlide(random_vit(), words, best).tiles(z)
    cosines = F.cosine_similarity(z[None], words.vectors_KC[:, None], dim=2)
    torch.testing.assert_close(found.tile_scores_KT, 10 * cosines)
    count = min(best or 7, 7)
    torch.testing.assert_close(found.scores_K, 10 * cosines.sort(dim=1, descending=True).values[:, :count].mean(dim=1))
    torch.testing.assert_close(found.relevance_KT.sum(dim=1), found.scores_K)
    assert ((found.share_KT > 0).sum(dim=1) == count).all()


def test_tokens_of_a_tile_are_those_of_its_score_times_its_share():
    model, (x, keep), words = random_vit(), sample(3), concepts()
    slide = ZeroShotSlide(model, words, best=2, m=20)
    with torch.no_grad():
        share = slide.tiles(model(x, keep)).share_KT
    maps = slide.tokens(x, share, keep)
    assert maps.shape == (2, 3, 4, 4)
    of_tiles = IntegratedCDAM(model, 20, "weights").attribute(x, words, keep)
    torch.testing.assert_close(maps, share[..., None, None] * of_tiles.transpose(0, 1))
    assert (maps[share == 0] == 0).all()
    assert (maps[:, ~keep] == 0).all()
    for b in range(3):
        torch.testing.assert_close(slide.tokens(x[b : b + 1], share[:, b : b + 1], keep[b : b + 1])[:, 0], maps[:, b])


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="best=0"):
        ZeroShotSlide(random_vit(), concepts(), 0)
    with pytest.raises(ValueError, match="got none"):
        ZeroShotSlide(random_vit(), concepts()).tiles(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="4 channels and an output of 5"):
        ZeroShotSlide(random_vit(), concepts()).tiles(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="method of a slide model"):
        ZeroShotSlide(random_vit(), concepts(), method="rise")
