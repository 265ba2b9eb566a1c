"""The check of a map: a map of what makes the score passes, its opposite contradicts, noise mostly does neither."""

from __future__ import annotations

import json

import pytest
import torch

from maskattn.explain.map_check import SHARES, check_maps

N = 200


def additive(seed: int):
    """A score that is the sum of its tokens' worth: (worth, keep, scores of subsets, those asked for)."""
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


def test_fifths_are_shown_alone_and_the_most_relevant_tokens_dropped_and_as_many_at_random():
    worth, keep, scores_of, asked = additive(1)
    (check, _) = check_maps(worth, keep, scores_of, draws=3)
    (subsets,) = asked
    kept = int(keep.sum())
    fifth, counts = round(0.2 * kept), [max(1, round(share * kept)) for share in SHARES]
    assert torch.equal(subsets[0], keep)
    assert not (subsets & ~keep).any()
    parts = subsets[1:].unflatten(0, (2 + 3, 6))
    assert parts.sum(dim=2).tolist() == [[fifth, fifth, *(kept - count for count in counts)]] * 5
    assert not (parts[:, 0] & parts[:, 1]).any()
    best = worth[0].masked_fill(~keep, -torch.inf).argsort(descending=True)[:kept]
    assert set(parts[0, 0].nonzero()[:, 0].tolist()) == set(best[:fifth].tolist())
    assert set(parts[0, 1].nonzero()[:, 0].tolist()) == set(best[-fifth:].tolist())
    alone, whole = parts.float() @ worth[0], float(worth[0, keep].sum())
    assert check.most_relevant_alone == pytest.approx(float(alone[0, 0]), rel=1e-4)
    assert check.least_relevant_alone == pytest.approx(float(alone[0, 1]), rel=1e-4)
    spread = float((alone[2:, 0] - alone[2:, 1]).square().mean().sqrt())
    assert check.spread_at_random == pytest.approx(spread, rel=1e-4)
    assert check.z == pytest.approx(float(alone[0, 0] - alone[0, 1]) / spread, rel=1e-4)
    for place, count in enumerate(counts, start=2):
        assert set((keep & ~parts[0, place]).nonzero()[:, 0].tolist()) == set(best[:count].tolist())
        assert check.drop_most_relevant[place - 2] == pytest.approx(whole - float(alone[0, place]), rel=1e-3)
        random = whole - float(alone[2:, place].mean())
        assert check.drop_at_random[place - 2] == pytest.approx(random, rel=1e-3, abs=1e-4)
    json.dumps(check.as_json(), allow_nan=False)


def test_without_shares_nothing_is_dropped_and_the_verdict_is_the_same():
    worth, keep, scores_of, asked = additive(3)
    full, quick = (check_maps(worth, keep, scores_of, shares=shares, draws=3)[0] for shares in (SHARES, ()))
    assert len(asked[1]) == 2 * (2 + 3)
    assert (quick.map_check, quick.z, quick.shares) == (full.map_check, pytest.approx(full.z), ())


def test_noise_passes_seldom_and_contradicts_seldom():
    verdicts = []
    for seed in range(60):
        _, keep, scores_of, _ = additive(seed)
        noise = torch.randn(2, N, generator=torch.Generator().manual_seed(1000 + seed))
        verdicts += [check.map_check for check in check_maps(noise, keep, scores_of, seed=seed)]
    assert verdicts.count("passed") < 0.2 * len(verdicts)
    assert verdicts.count("contradicts") < 0.2 * len(verdicts)
    assert verdicts.count("weak") > 0.6 * len(verdicts)


def test_a_map_that_turns_away_from_what_made_a_sure_model_sure_contradicts():
    """Three lesion tokens suffice, and every further one lowers the score a little: dropping would tell the wrong."""
    lesion = torch.arange(N) < N // 5

    def scores_of(keep_SN):
        seen = (keep_SN & lesion).sum(dim=1, keepdim=True).float()
        return seen.clamp(max=3) - seen / 40

    keep = torch.ones(N, dtype=torch.bool)
    noise = 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(0))
    (check,) = check_maps((lesion + noise)[None], keep, scores_of)
    assert check.map_check == "passed"
    (check,) = check_maps((noise - lesion.float())[None], keep, scores_of)
    assert check.map_check == "contradicts"


def test_a_score_that_never_moves_has_a_weak_map_and_two_tokens_have_none():
    keep = torch.ones(10, dtype=torch.bool)
    (check,) = check_maps(torch.arange(10.0)[None], keep, lambda subsets: torch.ones(len(subsets), 1))
    assert (check.map_check, check.z) == ("weak", 0.0)
    few = torch.arange(10) < 2
    (check,) = check_maps(torch.arange(10.0)[None], few, lambda subsets: torch.ones(len(subsets), 1))
    assert check.map_check == "skipped"
    assert check.passed


def test_the_draws_are_those_of_the_seed():
    worth, keep, scores_of, asked = additive(2)
    for seed in (0, 0, 1):
        check_maps(worth, keep, scores_of, seed=seed)
    assert torch.equal(asked[0], asked[1])
    assert not torch.equal(asked[0], asked[2])
