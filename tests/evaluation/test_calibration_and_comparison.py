"""Temperatures are found again, reliability is what was drawn, and two models are compared patient by patient."""

from __future__ import annotations

import numpy as np
import pytest

from maskattn.evaluation import Predictions
from maskattn.evaluation.calibration import fit_temperature, reliability_of, with_temperature
from maskattn.evaluation.comparison import compare, shared_patients
from maskattn.evaluation.intervals import distribution_of, draw_resamples, estimate
from maskattn.evaluation.metrics import metrics_of


def well_calibrated(patients, classes=3, seed=0, first=0):
    draw = np.random.default_rng(seed)
    scores = draw.dirichlet(np.ones(classes), patients)
    truth = (scores.cumsum(1) < draw.random(patients)[:, None]).sum(1).clip(max=classes - 1)
    names = [f"p{index}" for index in range(first, first + patients)]
    task = "binary" if classes == 2 else "multiclass"
    return Predictions(task, "grade", names, scores, truth, [f"c{index}" for index in range(classes)])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_on_is_found_again(temperature):
    spoilt = with_temperature(well_calibrated(8000), 1 / temperature)
    assert fit_temperature(spoilt) == pytest.approx(temperature, rel=0.06)


def test_a_temperature_keeps_the_order_of_scores_and_the_chosen_class():
    predictions = well_calibrated(50)
    warm = with_temperature(predictions, 2.5)
    assert np.array_equal(warm.scores_PK.argsort(1), predictions.scores_PK.argsort(1))
    assert np.array_equal(warm.predicted, predictions.predicted)
    assert np.allclose(warm.scores_PK.sum(1), 1)
    assert np.allclose(with_temperature(warm, 1 / 2.5).scores_PK, predictions.scores_PK)
    with pytest.raises(ValueError, match="above 0, got 0"):
        with_temperature(predictions, 0)


def test_confident_zeros_have_a_finite_temperature():
    hot = Predictions("binary", "msi", range(4), np.eye(2)[[0, 1, 0, 1]], [0, 1, 1, 1], ("no", "yes"))
    assert 1 < fit_temperature(hot) <= 20


def test_reliability_is_on_the_line_where_confidence_is_right():
    found = reliability_of(well_calibrated(20_000, classes=2))
    assert found.patients.sum() == 20_000
    assert abs(found.confidence - found.right).max() < 0.04
    assert ((found.low < found.confidence) & (found.confidence < found.high)).mean() >= 0.8


def noisier(predictions, noise, seed):
    draw = np.random.default_rng(seed)
    logits = np.log(predictions.scores_PK) + draw.normal(0, noise, predictions.scores_PK.shape)
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions(
        predictions.task, predictions.target, predictions.patient_ids, scores, predictions.truth, predictions.classes
    )


def test_a_worse_model_is_told_from_a_better_and_the_sign_says_which():
    good = well_calibrated(300, classes=2)
    found = {one.metric: one for one in compare(good, noisier(good, 2.0, 1))}
    auc = found["auc"]
    assert auc.difference.value == pytest.approx(auc.second - auc.first)
    assert auc.difference.high < 0
    assert auc.p < 0.01
    assert found["brier"].difference.low > 0
    back = {one.metric: one for one in compare(noisier(good, 2.0, 1), good)}
    assert back["auc"].difference.value == pytest.approx(-auc.difference.value)


def test_pairs_make_the_interval_of_a_difference_narrower_than_two_intervals():
    one = well_calibrated(300, classes=2)
    other = noisier(one, 0.1, 1)
    of_auc = metrics_of("binary")[0].prepared
    alone = [estimate(of_auc(each), draw_resamples(300, 1000, 0)) for each in (one, other)]
    apart = compare(one, other)[0].difference
    assert apart.high - apart.low < 0.4 * (alone[0].high - alone[0].low + alone[1].high - alone[1].low)


def test_of_two_models_that_are_alike_5_of_100_comparisons_find_a_difference():
    of_auc = metrics_of("binary")[0].prepared
    rejected = 0
    for seed in range(400):
        middle = well_calibrated(120, classes=2, seed=seed)
        one, other = (noisier(middle, 1.0, 10_000 + 2 * seed + side) for side in (0, 1))
        weights = draw_resamples(120, 300, seed)
        apart = distribution_of(of_auc(other), weights) - distribution_of(of_auc(one), weights)
        low, high = apart.limits()
        p = apart.p_value()
        assert (p < 0.05) == (not low <= 0 <= high) or abs(p - 0.05) < 0.02
        rejected += p < 0.05
    assert 0.025 <= rejected / 400 <= 0.08, rejected


def slides_of(predictions, slides):
    """Each patient's row again and again, as slides whose predictions are alike."""
    rows = np.repeat(np.arange(predictions.rows), slides)
    names = [f"s{index}" for index in range(len(rows))]
    owners = [predictions.patient_ids[row] for row in rows]
    return Predictions(
        predictions.task,
        predictions.target,
        names,
        predictions.scores_PK[rows],
        predictions.truth[rows],
        predictions.classes,
        patient_of=owners,
    )


def test_slides_that_repeat_their_patient_give_the_patients_intervals_and_p():
    one = well_calibrated(150, classes=2)
    other = noisier(one, 0.7, 1)
    plain, repeated = compare(one, other), compare(slides_of(one, 4), slides_of(other, 4))
    for patients, slides in zip(plain, repeated, strict=True):
        assert slides.difference.value == pytest.approx(patients.difference.value)
        assert slides.difference.low == pytest.approx(patients.difference.low)
        assert slides.difference.high == pytest.approx(patients.difference.high)
        assert slides.p == pytest.approx(patients.p)


def test_rows_of_two_patients_in_two_tables_are_told():
    one = slides_of(well_calibrated(30), 2)
    moved = Predictions(
        one.task, one.target, one.patient_ids, one.scores_PK, one.truth, one.classes, patient_of=one.owners[::-1]
    )
    with pytest.raises(ValueError, match="one patient in all tables, got two for s0, s1, s2"):
        compare(one, moved)


def test_reliability_takes_a_patients_slides_for_one():
    one = well_calibrated(400, classes=2)
    patients, slides = reliability_of(one), reliability_of(slides_of(one, 3))
    assert np.array_equal(slides.patients, patients.patients)
    assert np.allclose(slides.high - slides.low, patients.high - patients.low)


def test_a_model_does_not_differ_from_itself():
    found = compare(well_calibrated(60), well_calibrated(60))
    assert all(one.difference.value == 0 and one.difference.low is None and one.p is None for one in found)


def test_only_shared_patients_are_compared_in_one_order():
    one, other = well_calibrated(40), well_calibrated(40).of(np.arange(39, 9, -1))
    left, right = shared_patients(one, other)
    assert left.patient_ids == right.patient_ids == tuple(f"p{index}" for index in range(10, 40))
    assert np.array_equal(left.scores_PK, right.scores_PK)


def test_what_cannot_be_compared_is_told():
    one = well_calibrated(40)
    with pytest.raises(ValueError, match="one task, got 'multiclass' and 'binary'"):
        compare(one, well_calibrated(40, classes=2))
    with pytest.raises(ValueError, match=r"one list of classes, got .*c0.*c3"):
        compare(one, well_calibrated(40, classes=4))
    with pytest.raises(ValueError, match="share patients, got 0 of 40 and 40"):
        compare(one, well_calibrated(40, first=100))
    moved = Predictions("multiclass", "grade", one.patient_ids, one.scores_PK, (one.truth + 1) % 3, one.classes)
    with pytest.raises(ValueError, match="one label in all tables, got two for p0, p1, p2, p3, p4 and 35 more"):
        compare(one, moved)
