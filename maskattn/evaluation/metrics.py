"""The metrics of each task, and those of each class: what they are called, and how a resample of patients gives them.

Every value equals scikit-learn's, scipy's or scikit-survival's of the same patients. Means over classes are macro, over
the classes that the patients have, one against the rest.

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
        name: in ``metrics.json``.
        title: in the report.
        prepared: predictions → the metric of their resamples.
        better: whether more or less of it is better.
        meaning: a sentence for the report.
    """

    name: str
    title: str
    prepared: Callable[[Predictions], Weighted]
    better: str
    meaning: str


def check_evaluable(predictions: Predictions) -> None:
    """Whether there is something to measure.

    Raises:
        ValueError: all patients have one class or one value, or no two can be compared.
    """
    if predictions.is_classification:
        there = present_classes(predictions)
        if len(there) < 2:
            raise ValueError(
                f"an evaluation must have patients of two classes or more, got only {predictions.classes[there[0]]} "
                f"({predictions.patients} patients); add patients of the others"
            )
    elif predictions.task == "regression":
        if np.ptp(predictions.truth) == 0:
            raise ValueError(
                f"an evaluation must have patients of different {predictions.target}, got {predictions.truth[0]:g} of "
                f"all {predictions.patients}; add others"
            )
    elif np.isnan(_concordance(predictions)(np.ones((1, predictions.rows)))[0]):
        raise ValueError(
            "an evaluation of survival must have two patients who can be compared, the one with the shorter time with "
            f"the event, got {predictions.events.sum()} events in {predictions.patients} patients; add patients"
        )


def present_classes(predictions: Predictions) -> list[int]:
    """The classes that patients have."""
    return [int(index) for index in np.unique(predictions.truth)]


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """The metrics of a task, the one that matters most first."""
    return _METRICS[task]


def metrics_of_class(index: int) -> tuple[Metric, ...]:
    """The metrics of a class against the rest."""
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
    """True positives, false negatives, false positives and true negatives of a class."""
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
    """For two classes that of the second; for more the mean over the classes that patients have."""

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
    """Cohen's kappa; errors count by the distance of the classes to this power, 0 = all alike."""

    def prepared(predictions: Predictions) -> Weighted:
        counted = _counts(predictions)
        apart = np.abs(np.subtract.outer(range(len(predictions.classes)), range(len(predictions.classes))))
        cost_KK = (apart > 0).astype(np.float64) if power == 0 else apart.astype(np.float64) ** power

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
    # Of two classes the score has one number, and scikit-learn's is the square of its error.
    return weighted.mean_of(squares_P / 2 if len(predictions.classes) == 2 else squares_P)


def confidence_of(predictions: Predictions) -> tuple[Values, NDArray[np.bool_]]:
    """What calibration compares: of two classes the second's probability, of more that of the likeliest class."""
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
    "The area under the ROC curve: how often a patient of the class has a higher score than one without it; 0.5 is "
    "chance. Of more than two classes the mean of each against the rest.",
)
_AP = Metric(
    "average_precision",
    "Average precision",
    _positive_or_mean(_one_precision),
    "higher",
    "The mean precision over all recalls; chance is the share of the class.",
)
_ACCURACY = Metric("accuracy", "Accuracy", _accuracy, "higher", "The share of patients whose class is right.")
_BALANCED = Metric(
    "balanced_accuracy",
    "Balanced accuracy",
    _balanced_accuracy,
    "higher",
    "The mean over the classes of the share that is right; 1 divided by the number of classes is chance.",
)
_F1 = Metric(
    "f1",
    "F1",
    _f1_score,
    "higher",
    "The harmonic mean of precision and recall: of two classes the second's, of more the mean over them.",
)
_COHEN = Metric("kappa", "Cohen's kappa", _kappa(0), "higher", "Agreement beyond chance; 0 is chance.")
_QUADRATIC = Metric(
    "quadratic_weighted_kappa",
    "Quadratic-weighted kappa",
    _kappa(2),
    "higher",
    "Agreement beyond chance, where an error counts by the square of how many classes it is off; 0 is chance.",
)
_STEPS = Metric(
    "mae", "Mean error in classes", _steps_off, "lower", "How many classes a prediction is off, on average."
)
_BRIER = Metric(
    "brier",
    "Brier score",
    _brier,
    "lower",
    "The mean squared error of the probabilities; of more than two classes summed.",
)
_ECE = Metric(
    "ece",
    "Calibration error (ECE)",
    _calibration_error,
    "lower",
    f"How far confidence is from the share that is right, over {CALIBRATION_BINS} bins; too high of few patients.",
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
            "The share of the variance that is explained; 0 is what the mean explains, and it may be less.",
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
            "Harrell's: how often, of two patients who can be compared, the one with the higher risk had the event "
            "first; 0.5 is chance. With folds only patients of one fold are compared, since each model's risks have a "
            "scale of their own.",
        ),
    ),
}
