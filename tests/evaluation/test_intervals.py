"""Intervals cover what they say, in 1,000 simulations each, and never hide what they could not do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from maskattn.evaluation import Predictions, weighted
from maskattn.evaluation.intervals import Distribution, draw_resamples, estimate
from maskattn.evaluation.metrics import metrics_of

SIMULATIONS, RESAMPLES = 1000, 500


def kappa_of(truth, predicted, classes):
    count = len(truth)
    predictions = Predictions("ordinal", "grade", range(count), np.eye(classes)[predicted], truth, range(classes))
    return metrics_of("ordinal")[0].prepared(predictions)


class Accuracy:
    patients, truth = 100, 0.8

    def drawn(self, draw):
        return weighted.mean_of((draw.random(self.patients) < 0.8).astype(float))


class AreaUnderRoc:
    patients, truth = 100, stats.norm.cdf(1.2 / np.sqrt(2))

    def drawn(self, draw):
        positive = draw.random(self.patients) < 0.4
        return weighted.area_under_roc(positive, draw.normal(size=self.patients) + 1.2 * positive)


class QuadraticKappa:
    patients = 200
    cells = np.array([[16, 6, 2, 1], [5, 14, 5, 1], [1, 5, 14, 5], [0, 1, 5, 19]]) / 100

    def __init__(self):
        rows, columns = np.indices((4, 4)).reshape(2, -1)
        self.truth = kappa_of(rows, columns, 4)(self.cells.reshape(1, -1))[0]

    def drawn(self, draw):
        cell = draw.choice(16, self.patients, p=self.cells.ravel())
        return kappa_of(cell // 4, cell % 4, 4)


class Concordance:
    """Exponential times whose rate is exp(0.8 risk), and as long until a patient is lost."""

    patients, slope, lost = 100, 0.8, 0.7

    def __init__(self):
        points, share = np.polynomial.hermite_e.hermegauss(200)
        rate = np.exp(self.slope * points)
        share_KK = np.outer(share, share)
        # The first of the four times is the event of one of the two, and of which one.
        total_KK = rate[:, None] + rate + 2 * self.lost
        first_KK = np.maximum(rate[:, None], rate) / total_KK
        either_KK = (rate[:, None] + rate) / total_KK
        apart = 1 - np.eye(len(points))
        self.truth = (share_KK * first_KK * apart).sum() / (share_KK * either_KK * apart).sum()

    def drawn(self, draw):
        risk = draw.normal(size=self.patients)
        died = draw.exponential(np.exp(-self.slope * risk))
        left = draw.exponential(1 / self.lost, self.patients)
        return weighted.concordance(np.minimum(died, left), died <= left, risk)


@pytest.mark.parametrize("kind", [Accuracy, AreaUnderRoc, QuadraticKappa, Concordance], ids=lambda one: one.__name__)
def test_intervals_cover_the_truth_in_93_to_97_of_100_simulations(kind):
    cohort = kind()
    draw = np.random.default_rng(20)
    covered = 0
    for simulation in range(SIMULATIONS):
        found = estimate(cohort.drawn(draw), draw_resamples(cohort.patients, RESAMPLES, seed=simulation))
        covered += found.low <= cohort.truth <= found.high
    assert 0.93 <= covered / SIMULATIONS <= 0.97, covered


class SlidesOfPatients:
    """Patients of one to five slides, whose errors are alike: what is hard of one slide is hard of all."""

    patients = 100

    def drawn(self, draw):
        slides = draw.integers(1, 6, self.patients)
        patient_P = np.repeat(np.arange(self.patients), slides)
        return patient_P, draw.normal(size=self.patients)[patient_P], draw.normal(size=len(patient_P))


class AccuracyOfSlides(SlidesOfPatients):
    truth = stats.norm.cdf(0.8)

    def found(self, draw):
        patient_P, shared_P, own_P = self.drawn(draw)
        return patient_P, weighted.mean_of((0.8 + 0.9 * shared_P + np.sqrt(0.19) * own_P > 0).astype(float))


class AreaOfSlides(SlidesOfPatients):
    truth = stats.norm.cdf(1.2 / np.sqrt(2))

    def found(self, draw):
        patient_P, shared_P, own_P = self.drawn(draw)
        positive = (draw.random(self.patients) < 0.4)[patient_P]
        return patient_P, weighted.area_under_roc(positive, 1.2 * positive + 0.9 * shared_P + np.sqrt(0.19) * own_P)


@pytest.mark.parametrize("kind", [AccuracyOfSlides, AreaOfSlides], ids=lambda one: one.__name__)
def test_intervals_over_patients_cover_the_truth_where_slides_are_rows_and_intervals_over_slides_do_not(kind):
    cohort, draw = kind(), np.random.default_rng(21)
    over_patients = over_slides = 0
    for simulation in range(SIMULATIONS):
        patient_P, of = cohort.found(draw)
        rows = len(patient_P)
        together = draw_resamples(rows, RESAMPLES, simulation, cluster_P=patient_P)
        found = estimate(of, together, cluster_P=patient_P)
        over_patients += found.low <= cohort.truth <= found.high
        if simulation < 250:
            naive = estimate(of, draw_resamples(rows, RESAMPLES, simulation))
            over_slides += naive.low <= cohort.truth <= naive.high
    assert 0.93 <= over_patients / SIMULATIONS <= 0.97, over_patients
    assert over_slides / 250 < 0.9, over_slides


def test_all_rows_of_a_cluster_are_drawn_as_often_and_strata_count_clusters():
    clusters = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4])
    weights = draw_resamples(10, 300, 4, cluster_P=clusters)
    first = np.unique(clusters, return_index=True)[1]
    assert np.array_equal(weights, weights[:, first][:, clusters])
    assert (weights[:, first].sum(1) == 5).all()
    assert np.array_equal(weights[:, first], draw_resamples(5, 300, 4))
    # A patient with slides of both classes is of a stratum of its own.
    classes = np.array([0, 0, 0, 1, 0, 1, 0, 1, 1, 1])
    within = draw_resamples(10, 300, 4, classes, clusters)[:, first]
    assert (within[:, [0, 3]].sum(1) == 2).all()
    assert (within[:, [1, 4]].sum(1) == 2).all()
    assert (within[:, 2] == 1).all()


def test_limits_are_those_of_scipys_bootstrap():
    values = np.random.default_rng(1).exponential(size=60)
    found = estimate(weighted.mean_of(values), draw_resamples(60, 20_000, seed=0))
    told = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", random_state=np.random.default_rng(2))
    assert found.low == pytest.approx(told.confidence_interval.low, abs=0.01)
    assert found.high == pytest.approx(told.confidence_interval.high, abs=0.01)
    plain = np.quantile(values[np.random.default_rng(3).integers(0, 60, (20_000, 60))].mean(1), [0.025, 0.975])
    assert found.high - plain[1] > 0.02  # which a percentile interval, of no acceleration, misses


def test_the_seed_decides_and_strata_keep_their_sizes():
    strata = np.array([0] * 12 + [1] * 3)
    weights = draw_resamples(15, 200, 4, strata)
    assert np.array_equal(weights, draw_resamples(15, 200, 4, strata))
    assert not np.array_equal(weights, draw_resamples(15, 200, 5, strata))
    assert (weights[:, strata == 1].sum(1) == 3).all()
    plain = draw_resamples(15, 200, 4)
    assert (plain.sum(1) == 15).all()
    assert (plain[:, strata == 1].sum(1) != 3).any()


def test_resamples_without_a_class_are_dropped_and_counted():
    positive = np.array([True, True] + [False] * 18)
    score = np.random.default_rng(0).normal(size=20)
    weights = draw_resamples(20, 1000, 0)
    lacking = int((weights[:, :2].sum(1) == 0).sum())
    found = estimate(weighted.area_under_roc(positive, score), weights)
    assert lacking > 50
    assert found.dropped == lacking
    assert found.low < found.value < found.high
    strata = positive.astype(int)
    assert estimate(weighted.area_under_roc(positive, score), draw_resamples(20, 1000, 0, strata)).dropped == 0


def test_where_there_is_no_interval_the_reason_is_said():
    weights = draw_resamples(20, 200, 0)
    perfect = estimate(weighted.mean_of(np.ones(20)), weights)
    assert (perfect.value, perfect.low) == (1.0, None)
    assert "same in every resample" in perfect.note
    flat = estimate(weighted.pearson(np.arange(20.0), np.full(20, 0.1)), weights)
    assert flat.value is None
    assert "not defined" in flat.note
    mostly = estimate(lambda weights_BP: np.where(weights_BP[:, 0] == 1, 1.0, np.nan), weights)
    assert mostly.low is None
    assert "too few patients" in mostly.note


def test_more_patients_than_groups_give_the_same_interval():
    values = np.random.default_rng(1).exponential(size=900)
    of, weights = weighted.mean_of(values), draw_resamples(900, 2000, 0)
    found = estimate(of, weights)
    resampled = of(weights)
    every = Distribution(values.mean(), resampled, (values.sum() - values) / 899, 0).limits()
    assert (found.low, found.high) == pytest.approx(every, abs=0.005)


def test_a_p_value_is_at_5_per_cent_where_the_interval_meets_zero():
    draw = np.random.default_rng(0)
    resampled = draw.normal(0.3, 0.2, 4000)
    found = Distribution(0.3, resampled, draw.normal(0.3, 0.01, 200), 0)
    low, _ = found.limits()
    moved = Distribution(0.3 - low, resampled - low, found.without - low, 0)
    assert moved.p_value() == pytest.approx(0.05, abs=0.004)
