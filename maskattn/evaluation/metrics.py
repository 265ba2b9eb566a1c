"""The metrics of each task and of each class, as functions of resamples of the patients.

Every value equals that of scikit-learn, scipy or scikit-survival for the same patients. Means over classes are macro
averages over the classes that the patients have, each against the rest.

Dimension key: B resamples, P patients, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation import weighted
from maskattn.evaluation.predictions import Predictions, Task
from maskattn.evaluation.weighted import Values, Weighted

__all__ = [
    "CALIBRATION_BINS",
    "Metric",
    "check_evaluable",
    "confidence_of",
    "metrics_of",
    "metrics_of_class",
    "present_classes",
]

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: the name in ``metrics.json``.
        title: the title in the report.
        prepared: predictions → the metric as a function of their resamples.
        better: "higher" or "lower".
        meaning: an explanation for the report.
    """

    name: str
    title: str
    prepared: Callable[[Predictions], Weighted]
    better: str
    meaning: str


def check_evaluable(predictions: Predictions) -> None:
    """Check that metrics are defined for these predictions.

    Raises:
        ValueError: all patients have the same class or value, or no two can be compared.
    """
    if predictions.is_classification:
        present = present_classes(predictions)
        if len(present) < 2:
            raise ValueError(
                f"an evaluation must have patients of two classes or more, got only {predictions.classes[present[0]]} "
                f"({predictions.patients} patients); add patients of the others"
            )
    elif predictions.task == "regression":
        if np.ptp(predictions.truth) == 0:
            raise ValueError(
                f"an evaluation must have patients of different {predictions.target}, got {predictions.truth[0]:g} for "
                f"all {predictions.patients}; add others"
            )
    elif np.isnan(_concordance(predictions)(np.ones((1, predictions.rows)))[0]):
        raise ValueError(
            "an evaluation of survival must have two comparable patients, of whom the one with the shorter time had "
            f"the event, got {predictions.events.sum()} events in {predictions.patients} patients; add patients"
        )


def present_classes(predictions: Predictions) -> list[int]:
    """Return the indices of the classes that patients have."""
    return [int(index) for index in np.unique(predictions.truth)]


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """Return the metrics of a task, the main one first."""
    return _METRICS[task]


def metrics_of_class(index: int) -> tuple[Metric, ...]:
    """Return the metrics of a class against the rest."""
    return (
        Metric("auc", "AUC", lambda p: _one_auc(p, index), "higher", ""),
        Metric("average_precision", "Average precision", lambda p: _one_precision(p, index), "higher", ""),
        Metric("sensitivity", "Sensitivity", lambda p: _of_cells(p, index, _sensitivity), "higher", ""),
        Metric("specificity", "Specificity", lambda p: _of_cells(p, index, _specificity), "higher", ""),
        Metric("precision", "Precision", lambda p: _of_cells(p, index, _precision), "higher", ""),
        Metric("f1", "F1", lambda p: _of_cells(p, index, _f1), "higher", ""),
    )


def _share(above: Values, below: Values) -> Values:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _cells(counts_BKK: Values, index: int) -> tuple[Values, Values, Values, Values]:
    """Return the true positives, false negatives, false positives and true negatives of a class."""
    hit = counts_BKK[:, index, index]
    missed = counts_BKK[:, index].sum(1) - hit
    wrong = counts_BKK[:, :, index].sum(1) - hit
    return hit, missed, wrong, counts_BKK.sum((1, 2)) - hit - missed - wrong


def _sensitivity(hit: Values, missed: Values, wrong: Values, other: Values) -> Values:
    return _share(hit, hit + missed)


def _specificity(hit: Values, missed: Values, wrong: Values, other: Values) -> Values:
    return _share(other, other + wrong)


def _precision(hit: Values, missed: Values, wrong: Values, other: Values) -> Values:
    return _share(hit, hit + wrong)


def _f1(hit: Values, missed: Values, wrong: Values, other: Values) -> Values:
    return _share(2 * hit, 2 * hit + missed + wrong)


def _counts(predictions: Predictions) -> Weighted:
    return weighted.confusion(predictions.truth, predictions.predicted, len(predictions.classes))


def _of_cells(predictions: Predictions, index: int, of: Callable[..., Values]) -> Weighted:
    counted = _counts(predictions)
    return lambda weights_BP: of(*_cells(counted(weights_BP), index))


def _macro(predictions: Predictions, of: Callable[..., Values], classes: list[int]) -> Weighted:
    counted = _counts(predictions)

    def mean(weights_BP: Values) -> Values:
        counts_BKK = counted(weights_BP)
        return np.mean([of(*_cells(counts_BKK, index)) for index in classes], axis=0)

    return mean


def _one_auc(predictions: Predictions, index: int) -> Weighted:
    return weighted.area_under_roc(predictions.truth == index, predictions.scores_PK[:, index])


def _one_precision(predictions: Predictions, index: int) -> Weighted:
    return weighted.average_precision(predictions.truth == index, predictions.scores_PK[:, index])


def _positive_or_mean(one: Callable[[Predictions, int], Weighted]) -> Callable[[Predictions], Weighted]:
    """Return a metric that is the second class's for two classes, and otherwise the mean over the present classes."""

    def prepared(predictions: Predictions) -> Weighted:
        if len(predictions.classes) == 2:
            return one(predictions, 1)
        of_each = [one(predictions, index) for index in present_classes(predictions)]
        return lambda weights_BP: np.mean([of(weights_BP) for of in of_each], axis=0)

    return prepared


def _accuracy(predictions: Predictions) -> Weighted:
    return weighted.mean_of((predictions.truth == predictions.predicted).astype(np.float64))


def _balanced_accuracy(predictions: Predictions) -> Weighted:
    return _macro(predictions, _sensitivity, present_classes(predictions))


def _f1_score(predictions: Predictions) -> Weighted:
    if predictions.task == "binary":
        return _of_cells(predictions, 1, _f1)
    named = np.union1d(predictions.truth, predictions.predicted)
    return _macro(predictions, _f1, [int(index) for index in named])


def _kappa(power: int) -> Callable[[Predictions], Weighted]:
    """Return Cohen's kappa, with errors weighted by this power of the classes' distance; 0 weights all equally."""

    def prepared(predictions: Predictions) -> Weighted:
        counted = _counts(predictions)
        distance_KK = np.abs(np.subtract.outer(range(len(predictions.classes)), range(len(predictions.classes))))
        cost_KK = (distance_KK > 0).astype(np.float64) if power == 0 else distance_KK.astype(np.float64) ** power

        def kappa(weights_BP: Values) -> Values:
            counts_BKK = counted(weights_BP)
            by_chance = (
                counts_BKK.sum(2)[:, :, None] * counts_BKK.sum(1)[:, None] / counts_BKK.sum((1, 2))[:, None, None]
            )
            return 1 - _share((counts_BKK * cost_KK).sum((1, 2)), (by_chance * cost_KK).sum((1, 2)))

        return kappa

    return prepared


def _steps_off(predictions: Predictions) -> Weighted:
    return weighted.mean_of(np.abs(predictions.truth - predictions.predicted).astype(np.float64))


def _brier(predictions: Predictions) -> Weighted:
    hot_PK = np.eye(len(predictions.classes))[predictions.truth]
    squares_P = ((predictions.scores_PK - hot_PK) ** 2).sum(1)
    # For two classes, scikit-learn's score is the squared error of one probability.
    return weighted.mean_of(squares_P / 2 if len(predictions.classes) == 2 else squares_P)


def confidence_of(predictions: Predictions) -> tuple[Values, NDArray[np.bool_]]:
    """Return (P,) confidences and whether they are right: of the second of two classes, or of the likeliest class."""
    if len(predictions.classes) == 2:
        return predictions.scores_PK[:, 1], predictions.truth == 1
    return predictions.scores_PK.max(1), predictions.scores_PK.argmax(1) == predictions.truth


def _calibration_error(predictions: Predictions) -> Weighted:
    return weighted.calibration_error(*confidence_of(predictions), CALIBRATION_BINS)


def _concordance(predictions: Predictions) -> Weighted:
    return weighted.concordance(predictions.times, predictions.events, predictions.scores_PK[:, 0], predictions.fold_P)


def _values(predictions: Predictions) -> tuple[Values, Values]:
    return predictions.truth, predictions.scores_PK[:, 0]


def _error(power: int) -> Callable[[Predictions], Weighted]:
    def prepared(predictions: Predictions) -> Weighted:
        truth_P, value_P = _values(predictions)
        mean = weighted.mean_of(np.abs(truth_P - value_P) ** power)
        return (lambda weights_BP: np.sqrt(mean(weights_BP))) if power == 2 else mean

    return prepared


_AUC = Metric(
    "auc",
    "AUC",
    _positive_or_mean(_one_auc),
    "higher",
    "The area under the ROC curve: how often a patient of the class has a higher score than another patient; 0.5 is "
    "chance. For more than two classes, the mean over the classes, each against the rest.",
)
_AP = Metric(
    "average_precision",
    "Average precision",
    _positive_or_mean(_one_precision),
    "higher",
    "The mean precision over all recalls; chance is the share of the class.",
)
_ACCURACY = Metric("accuracy", "Accuracy", _accuracy, "higher", "The share of patients with the right class.")
_BALANCED = Metric(
    "balanced_accuracy",
    "Balanced accuracy",
    _balanced_accuracy,
    "higher",
    "The mean over the classes of the share that is right; chance is 1 divided by the number of classes.",
)
_F1 = Metric(
    "f1",
    "F1",
    _f1_score,
    "higher",
    "The harmonic mean of precision and recall: of the second of two classes, or the mean over more classes.",
)
_COHEN = Metric("kappa", "Cohen's kappa", _kappa(0), "higher", "Agreement beyond chance; 0 is chance.")
_QUADRATIC = Metric(
    "quadratic_weighted_kappa",
    "Quadratic-weighted kappa",
    _kappa(2),
    "higher",
    "Agreement beyond chance, with errors weighted by the square of their distance in classes; 0 is chance.",
)
_STEPS = Metric("mae", "Mean error in classes", _steps_off, "lower", "The mean distance of predictions in classes.")
_BRIER = Metric(
    "brier",
    "Brier score",
    _brier,
    "lower",
    "The mean squared error of the probabilities, summed over more than two classes.",
)
_ECE = Metric(
    "ece",
    "Calibration error (ECE)",
    _calibration_error,
    "lower",
    f"The distance of confidence from the share that is right, over {CALIBRATION_BINS} bins; biased upwards for few "
    "patients.",
)
_NOMINAL = (_AUC, _AP, _ACCURACY, _BALANCED, _F1)

_METRICS: dict[Task, tuple[Metric, ...]] = {
    "binary": (*_NOMINAL, _COHEN, _BRIER, _ECE),
    "multiclass": (*_NOMINAL, _COHEN, _BRIER, _ECE),
    "ordinal": (_QUADRATIC, *_NOMINAL, _STEPS, _BRIER, _ECE),
    "regression": (
        Metric(
            "r2",
            "R²",
            lambda p: weighted.determination(*_values(p)),
            "higher",
            "The share of the variance that is explained; 0 for the mean as prediction, and it may be negative.",
        ),
        Metric("mae", "Mean absolute error", _error(1), "lower", "In the unit of the target."),
        Metric("rmse", "Root mean squared error", _error(2), "lower", "In the unit of the target."),
        Metric("pearson", "Pearson's r", lambda p: weighted.pearson(*_values(p)), "higher", "Linear correlation."),
        Metric("spearman", "Spearman's ρ", lambda p: weighted.spearman(*_values(p)), "higher", "Correlation of ranks."),
    ),
    "survival": (
        Metric(
            "c_index",
            "C-index",
            _concordance,
            "higher",
            "Harrell's: how often, of two comparable patients, the one with the higher risk had the event first; 0.5 "
            "is chance. With folds, only patients of the same fold are compared, because each model's risks have "
            "their own scale.",
        ),
    ),
}
