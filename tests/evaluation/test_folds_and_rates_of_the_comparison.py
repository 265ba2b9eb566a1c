"""The comparison with an independent loop: its choice of a rate, and its AUC within the folds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.evidence.folds_auc import auc_within_folds, cells_within_folds, interval_within_folds
from bench.evidence.rate_choice import RATES, aucs_of_rates, best_rate, table_of_rates
from maskattn.evaluation import Predictions


@pytest.mark.parametrize("peak", [2e-5, 3e-4, 1e-3, 3e-3, 2e-2])
def test_the_grid_grows_until_the_best_rate_is_inside(peak: float) -> None:
    tried: list[float] = []

    def auc_at(rate: float) -> float:
        tried.append(rate)
        return 0.9 - abs(math.log10(rate / peak)) / 100

    aucs = aucs_of_rates(auc_at)
    best = best_rate(aucs)
    assert min(aucs) < best < max(aucs)
    assert abs(math.log10(best / peak)) <= 0.27
    assert len(tried) == len(set(tried)) == len(aucs)
    assert {f"{rate:e}"[0] for rate in aucs} <= {"1", "3"}


def test_of_equal_rates_the_middle_one_is_taken() -> None:
    assert best_rate(dict.fromkeys(RATES, 0.5)) == 1e-3


def test_a_rate_that_a_model_did_not_need_is_an_empty_cell() -> None:
    table = table_of_rates({"one": {1e-3: 0.9, 3e-3: 0.8}, "two": {3e-3: 0.7}}, {"one": 0.6, "two": 0.5})
    assert table.splitlines()[2:] == ["| one | 0.900 | 0.800 | 0.600 |", "| two |  | 0.700 | 0.500 |"]


def test_the_auc_within_folds_is_blind_to_each_folds_scale_and_lies_in_its_interval() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    folds, same_scale, expected = [], [], []
    for fold in range(3):
        truth = np.arange(40) % 2
        score = np.clip(0.35 + 0.3 * truth + 0.15 * rng.normal(size=40), 0.01, 0.99)
        expected.append(sklearn.roc_auc_score(truth, score))
        names = tuple(f"p{fold}{row:02}" for row in range(40))
        for found, power in ((same_scale, 1), (folds, 6**fold)):
            scores_PK = np.stack([1 - score**power, score**power], axis=1)
            found.append(Predictions("binary", "t", names, scores_PK, truth.tolist(), ("0", "1")).in_fold(fold))
    apart, together = Predictions.joined(folds), Predictions.joined(same_scale)
    assert auc_within_folds(apart) == pytest.approx(np.mean(expected))
    assert sklearn.roc_auc_score(apart.truth_P, apart.scores_PK[:, 1]) < auc_within_folds(apart) - 0.1
    assert interval_within_folds(apart) == pytest.approx(interval_within_folds(together))
    low, high = interval_within_folds(apart)
    assert low < np.mean(expected) < high
    assert cells_within_folds(together, apart)[1] == "yes"
