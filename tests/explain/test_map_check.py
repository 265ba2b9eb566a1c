"""The test of a map: a map of what the score loses passes, its opposite contradicts, noise mostly does neither."""

from __future__ import annotations

import json

import pytest
import torch

from maskattn.explain.map_check import SHARES, check_maps

N = 200


def additive(seed: int):
    """A score that is the sum of what its tokens are worth: (worth, keep, scores of subsets, those asked for)."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randn(2, N, generator=generator)
    asked = []

    def scores_of(keep_SN):
        asked.append(keep_SN)
        return keep_SN.float() @ worth.T

    return worth, torch.rand(N, generator=generator) > 0.2, scores_of, asked


def test_the_worth_of_tokens_passes_and_its_opposite_contradicts():
    worth, keep, scores_of, _ = additive(0)
    for sign, verdict in ((1, "passed"), (-1, "contradicts")):
        checks = check_maps(sign * worth, keep, scores_of)
        assert [check.map_check for check in checks] == [verdict] * 2
        assert checks[0].passed == (sign == 1)


def test_what_is_dropped_is_the_most_relevant_of_what_is_kept_and_as_many_at_random():
    worth, keep, scores_of, asked = additive(1)
    (check, _) = check_maps(worth, keep, scores_of, draws=3)
    (subsets,) = asked
    kept = int(keep.sum())
    counts = [max(1, round(share * kept)) for share in SHARES]
    assert torch.equal(subsets[0], keep)
    assert not (subsets & ~keep).any()
    gone = (keep & ~subsets[1:]).unflatten(0, (2 + 3, 4))
    assert gone.sum(dim=2).tolist() == [counts] * 5
    best = worth[0].masked_fill(~keep, -torch.inf).argsort(descending=True)
    for place, count in enumerate(counts):
        assert set(gone[0, place].nonzero()[:, 0].tolist()) == set(best[:count].tolist())
        assert check.drop_most_relevant[place] == pytest.approx(float(worth[0, best[:count]].sum()), rel=1e-4)
        assert check.drop_at_random[place] == pytest.approx(
            float((gone[2:, place].float() @ worth[0]).mean()), rel=1e-3, abs=1e-4
        )
    json.dumps(check.as_json(), allow_nan=False)


def test_noise_passes_seldom_and_contradicts_seldom():
    verdicts = []
    for seed in range(60):
        _, keep, scores_of, _ = additive(seed)
        noise = torch.randn(2, N, generator=torch.Generator().manual_seed(1000 + seed))
        verdicts += [check.map_check for check in check_maps(noise, keep, scores_of, seed=seed)]
    assert verdicts.count("passed") < 0.2 * len(verdicts)
    assert verdicts.count("contradicts") < 0.2 * len(verdicts)
    assert verdicts.count("weak") > 0.6 * len(verdicts)


def test_a_score_that_never_moves_has_a_weak_map_and_a_single_token_none():
    keep = torch.ones(10, dtype=torch.bool)
    (check,) = check_maps(torch.arange(10.0)[None], keep, lambda subsets: torch.ones(len(subsets), 1))
    assert (check.map_check, check.z) == ("weak", 0.0)
    alone = torch.arange(10) == 3
    (check,) = check_maps(torch.arange(10.0)[None], alone, lambda subsets: torch.ones(len(subsets), 1))
    assert check.map_check == "skipped"
    assert check.passed


def test_the_draws_are_those_of_the_seed():
    worth, keep, scores_of, asked = additive(2)
    for seed in (0, 0, 1):
        check_maps(worth, keep, scores_of, seed=seed)
    assert torch.equal(asked[0], asked[1])
    assert not torch.equal(asked[0], asked[2])
