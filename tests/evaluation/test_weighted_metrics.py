"""Metrics equal those of scikit-learn, scipy, scikit-survival and torchmetrics, of patients and of every resample."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from maskattn.evaluation import Predictions
from maskattn.evaluation.intervals import draw_resamples
from maskattn.evaluation.metrics import CALIBRATION_BINS, check_evaluable, metrics_of, metrics_of_class

RESAMPLES = 12


def classes(task, count, patients=80, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, count, patients)
    # Rounded, so that scores tie.
    logits = (draw.normal(size=(patients, count)) + 1.2 * np.eye(count)[truth]).round(1)
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions(task, "grade", range(patients), scores, truth, [f"c{index}" for index in range(count)])


def values(patients=60, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.normal(50, 12, patients).round()
    return Predictions("regression", "age", range(patients), (truth + draw.normal(0, 9, patients))[:, None], truth)


def survival(patients=70, seed=0, **more):
    draw = np.random.default_rng(seed)
    risk = draw.normal(size=patients).round(1)
    died, left = draw.exponential(np.exp(-risk)).round(1), draw.exponential(1.5, patients).round(1)
    time, event = np.minimum(died, left), died <= left
    return Predictions("survival", "death", range(patients), risk[:, None], time_P=time, event_P=event, **more)


def expected(name, predictions):
    """The metric as another library has it; NaN where it has none."""
    if predictions.task == "survival":
        from sksurv.metrics import concordance_index_censored

        return concordance_index_censored(predictions.events, predictions.times, predictions.scores_PK[:, 0])[0]
    truth, scores = predictions.truth, predictions.scores_PK
    if predictions.task == "regression":
        value = scores[:, 0]
        return {
            "r2": lambda: sklearn.r2_score(truth, value),
            "mae": lambda: sklearn.mean_absolute_error(truth, value),
            "rmse": lambda: sklearn.root_mean_squared_error(truth, value),
            "pearson": lambda: stats.pearsonr(truth, value).statistic,
            "spearman": lambda: stats.spearmanr(truth, value).statistic,
        }[name]()
    two = len(predictions.classes) == 2
    labels = np.arange(len(predictions.classes))
    hot = np.eye(len(labels))[truth]
    return {
        "auc": lambda: sklearn.roc_auc_score(truth, scores[:, 1] if two else scores, multi_class="ovr", labels=labels),
        "average_precision": lambda: sklearn.average_precision_score(
            truth if two else hot, scores[:, 1] if two else scores
        ),
        "accuracy": lambda: sklearn.accuracy_score(truth, predictions.predicted),
        "balanced_accuracy": lambda: sklearn.balanced_accuracy_score(truth, predictions.predicted),
        "f1": lambda: sklearn.f1_score(truth, predictions.predicted, average="binary" if two else "macro"),
        "kappa": lambda: sklearn.cohen_kappa_score(truth, predictions.predicted),
        "quadratic_weighted_kappa": lambda: sklearn.cohen_kappa_score(
            truth, predictions.predicted, weights="quadratic", labels=labels
        ),
        "mae": lambda: sklearn.mean_absolute_error(truth, predictions.predicted),
        "brier": lambda: sklearn.brier_score_loss(truth, scores[:, 1] if two else scores, labels=labels),
        "ece": lambda: calibration_error(predictions),
    }[name]()


def calibration_error(predictions):
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    truth, scores = torch.from_numpy(predictions.truth), torch.from_numpy(predictions.scores_PK)
    if len(predictions.classes) == 2:
        return float(binary_calibration_error(scores[:, 1].contiguous(), truth, n_bins=CALIBRATION_BINS))
    return float(multiclass_calibration_error(scores, truth, len(predictions.classes), n_bins=CALIBRATION_BINS))


def repeated(predictions, weights):
    """The patients of a resample, each as often as it was drawn, under names of their own."""
    rows = np.repeat(np.arange(predictions.patients), weights.astype(int))
    columns = ("scores_PK", "truth_P", "predicted_P", "time_P", "event_P")
    given = {name: getattr(predictions, name) for name in columns}
    drawn = {name: None if value is None else value[rows] for name, value in given.items()}
    return Predictions(predictions.task, predictions.target, range(len(rows)), classes=predictions.classes, **drawn)


EVERY = [classes("binary", 2), classes("multiclass", 4), classes("ordinal", 5), values(), survival()]


@pytest.mark.parametrize("predictions", EVERY, ids=lambda one: one.task)
def test_every_metric_of_patients_and_of_resamples_equals_another_librarys(predictions):
    weights = draw_resamples(predictions.patients, RESAMPLES, seed=1)
    for metric in metrics_of(predictions.task):
        of = metric.prepared(predictions)
        assert of(np.ones((1, predictions.patients)))[0] == pytest.approx(expected(metric.name, predictions), abs=1e-6)
        found = of(weights)
        assert found.shape == (RESAMPLES,)
        for row in range(RESAMPLES):
            told = expected(metric.name, repeated(predictions, weights[row]))
            assert found[row] == pytest.approx(told, abs=1e-6), metric.name


def test_metrics_of_a_class_equal_scikit_learns_against_the_rest():
    predictions = classes("multiclass", 3)
    truth, chosen = predictions.truth == 2, predictions.predicted == 2
    told = {
        "auc": sklearn.roc_auc_score(truth, predictions.scores_PK[:, 2]),
        "average_precision": sklearn.average_precision_score(truth, predictions.scores_PK[:, 2]),
        "sensitivity": sklearn.recall_score(truth, chosen),
        "specificity": sklearn.recall_score(~truth, ~chosen),
        "precision": sklearn.precision_score(truth, chosen),
        "f1": sklearn.f1_score(truth, chosen),
    }
    found = {one.name: one.prepared(predictions)(np.ones((1, 80)))[0] for one in metrics_of_class(2)}
    assert found == pytest.approx(told)


def test_resamples_that_lack_a_class_have_no_auc_and_no_warning():
    predictions = classes("binary", 2, patients=4)
    weights = np.array([[4.0, 0, 0, 0], [1, 1, 1, 1]])
    found = {one.name: one.prepared(predictions)(weights) for one in metrics_of("binary")}
    assert np.isnan(found["auc"][0])
    assert not np.isnan(found["auc"][1])
    assert np.isnan(found["balanced_accuracy"][0])
    assert not np.isnan(found["accuracy"][0])


def test_a_class_without_patients_is_no_part_of_the_means():
    whole = classes("multiclass", 3)
    predictions = whole.of(whole.truth != 1)
    found = {
        one.name: one.prepared(predictions)(np.ones((1, predictions.patients)))[0] for one in metrics_of("ordinal")
    }
    present = [sklearn.roc_auc_score(predictions.truth == index, predictions.scores_PK[:, index]) for index in (0, 2)]
    assert found["auc"] == pytest.approx(np.mean(present))
    assert not np.isnan(list(found.values())).any()


def test_with_folds_only_patients_of_one_fold_are_compared():
    from sksurv.metrics import concordance_index_censored

    fold = np.arange(70) % 2
    predictions = survival(fold_P=fold)
    counts = np.zeros(3)
    for part in (0, 1):
        one = predictions.of(fold == part)
        told = concordance_index_censored(one.events, one.times, one.scores_PK[:, 0])
        counts += told[1:4]
    found = metrics_of("survival")[0].prepared(predictions)(np.ones((1, 70)))[0]
    assert found == pytest.approx((counts[0] + counts[2] / 2) / counts.sum())


@pytest.mark.parametrize(
    ("predictions", "told"),
    [
        (classes("binary", 2).of(classes("binary", 2).truth == 1), "got only c1"),
        (values().of([0]), "patients of different age, got"),
        (survival().of(~survival().events), "got 0 events in"),
    ],
)
def test_what_has_nothing_to_measure_is_told(predictions, told):
    with pytest.raises(ValueError, match=told):
        check_evaluable(predictions)
