"""Metrics of weighted patients, for many bootstrap resamples at once: a resample is a weight for each patient.

The functions here return a metric that takes ``weights_BP``, (B, P) counts of P patients in B resamples, and returns
(B,) values: what scikit-learn, scipy or scikit-survival would compute for the patients repeated as often, NaN if
undefined. With weights of 1 it is the metric of the patients themselves.

Dimension key: B resamples, P patients, K classes, G groups of equal scores.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Values",
    "Weighted",
    "area_under_roc",
    "average_precision",
    "calibration_error",
    "concordance",
    "confusion",
    "determination",
    "mean_of",
    "pearson",
    "spearman",
]

Values = NDArray[np.float64]
Weighted = Callable[[Values], Values]
_TIED_RISK = 1e-8  # scikit-survival's tolerance
_MOST_PAIRS = 4_000_000  # pairs of patients in a block: 32 MB


def mean_of(values_P: Values) -> Weighted:
    """Return the mean of the patients' values."""
    return lambda weights_BP: weights_BP @ values_P / weights_BP.sum(1)


def confusion(truth_P: NDArray[np.int64], predicted_P: NDArray[np.int64], classes: int) -> Weighted:
    """Return the confusion matrix, (B, K, K) counts: rows are the true classes, columns the predicted ones."""
    cells = np.zeros((len(truth_P), classes * classes))
    cells[np.arange(len(truth_P)), truth_P * classes + predicted_P] = 1
    return lambda weights_BP: (weights_BP @ cells).reshape(-1, classes, classes)


def area_under_roc(positive_P: NDArray[np.bool_], score_P: Values) -> Weighted:
    """Return the area under the ROC curve: the share of pairs in order, with equal scores counted half."""
    order, starts = _groups(score_P)

    def weighted(weights_BP: Values) -> Values:
        positive_BG, negative_BG = _both(weights_BP, positive_P, order, starts)
        below_BG = negative_BG.cumsum(1) - negative_BG / 2
        pairs_B = positive_BG.sum(1) * negative_BG.sum(1)
        return _ratio((positive_BG * below_BG).sum(1), pairs_B)

    return weighted


def average_precision(positive_P: NDArray[np.bool_], score_P: Values) -> Weighted:
    """Return the average precision: precision at each score, weighted by the increase of recall."""
    order, starts = _groups(-score_P)

    def weighted(weights_BP: Values) -> Values:
        positive_BG, negative_BG = _both(weights_BP, positive_P, order, starts)
        found_BG = positive_BG.cumsum(1)
        called_BG = found_BG + negative_BG.cumsum(1)
        precision_BG = np.divide(found_BG, called_BG, out=np.zeros_like(found_BG), where=called_BG > 0)
        return _ratio((precision_BG * positive_BG).sum(1), positive_BG.sum(1))

    return weighted


def concordance(
    time_P: Values, event_P: NDArray[np.bool_], risk_P: Values, fold_P: NDArray[np.int64] | None = None
) -> Weighted:
    """Return Harrell's concordance index: the share of comparable pairs in order, with equal risks counted half.

    Two patients are comparable if the one with the shorter time had the event or, for equal times, if one had it and
    the other was censored. With folds, only patients of the same fold are compared, because each fold's model has its
    own scale.
    """

    def block(rows: slice) -> tuple[Values, Values]:
        later = time_P > time_P[rows, None]
        tied = (time_P == time_P[rows, None]) & ~event_P
        comparable = event_P[rows, None] & (later | tied)
        if fold_P is not None:
            comparable &= fold_P == fold_P[rows, None]
        ahead = risk_P[rows, None] - risk_P
        in_order = np.where(abs(ahead) <= _TIED_RISK, 0.5, ahead > 0) * comparable
        return in_order, comparable.astype(np.float64)

    def weighted(weights_BP: Values) -> Values:
        good_B, all_B = np.zeros(len(weights_BP)), np.zeros(len(weights_BP))
        height = max(1, _MOST_PAIRS // len(time_P))
        for start in range(0, len(time_P), height):
            rows = slice(start, start + height)
            in_order, comparable = block(rows)
            good_B += ((weights_BP[:, rows] @ in_order) * weights_BP).sum(1)
            all_B += ((weights_BP[:, rows] @ comparable) * weights_BP).sum(1)
        return _ratio(good_B, all_B)

    return weighted


def determination(truth_P: Values, value_P: Values) -> Weighted:
    """Return the coefficient of determination: 1 minus the squared errors over the squared deviations from the mean."""

    def weighted(weights_BP: Values) -> Values:
        centred_P = truth_P - truth_P.mean()  # avoids the cancellation of a large mean
        mean_B = weights_BP @ centred_P / weights_BP.sum(1)
        spread_B = weights_BP @ centred_P**2 - weights_BP.sum(1) * mean_B**2
        return 1 - _ratio(weights_BP @ (truth_P - value_P) ** 2, np.where(spread_B > _little(truth_P), spread_B, 0))

    return weighted


def pearson(one_P: Values, other_P: Values) -> Weighted:
    """Return Pearson's correlation."""
    return lambda weights_BP: _correlation(weights_BP, one_P[None], other_P[None])


def spearman(one_P: Values, other_P: Values) -> Weighted:
    """Return Spearman's correlation: Pearson's of the ranks, where equal values have the mean of their ranks."""
    groups = _groups(one_P), _groups(other_P)

    def weighted(weights_BP: Values) -> Values:
        ranks = [_ranks(weights_BP, order, starts) for order, starts in groups]
        return _correlation(weights_BP, *ranks)

    return weighted


def calibration_error(confidence_P: Values, correct_P: NDArray[np.bool_], bins: int) -> Weighted:
    """Return the expected calibration error: the distance of the share that is correct from the confidence, by bins."""
    bin_P = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence_P, side="right")
    members = np.zeros((len(bin_P), bins))
    members[np.arange(len(bin_P)), bin_P] = correct_P - confidence_P

    def weighted(weights_BP: Values) -> Values:
        return abs(weights_BP @ members).sum(1) / weights_BP.sum(1)

    return weighted


def _groups(score_P: Values) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ascending order of scores, and the start in it of each group of equal scores."""
    order = np.argsort(score_P, kind="stable")
    ordered = score_P[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _both(
    weights_BP: Values, positive_P: NDArray[np.bool_], order: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[Values, Values]:
    """Return the (B, G) weights of positive and of negative patients in each group."""
    ordered_BP = weights_BP[:, order]
    all_BG = np.add.reduceat(ordered_BP, starts, axis=1)
    positive_BG = np.add.reduceat(ordered_BP * positive_P[order], starts, axis=1)
    return positive_BG, all_BG - positive_BG


def _ranks(weights_BP: Values, order: NDArray[np.int64], starts: NDArray[np.int64]) -> Values:
    """Return the (B, P) rank, from 1, of each patient's value in each resample."""
    weight_BG = np.add.reduceat(weights_BP[:, order], starts, axis=1)
    middle_BG = weight_BG.cumsum(1) - (weight_BG - 1) / 2
    group_of = np.empty(len(order), dtype=np.int64)
    group_of[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    return middle_BG[:, group_of]


def _correlation(weights_BP: Values, one: Values, other: Values) -> Values:
    """Return the (B,) Pearson's correlation of values (1, P), or (B, P) if they differ between resamples."""
    total_B = weights_BP.sum(1)
    little = _little(one), _little(other)
    one = one - ((weights_BP * one).sum(1) / total_B)[:, None]
    other = other - ((weights_BP * other).sum(1) / total_B)[:, None]
    covariance_B = (weights_BP * one * other).sum(1)
    spreads_B = (weights_BP * one**2).sum(1), (weights_BP * other**2).sum(1)
    flat_B = (spreads_B[0] <= little[0]) | (spreads_B[1] <= little[1])
    return _ratio(covariance_B, np.where(flat_B, 0, np.sqrt(spreads_B[0] * spreads_B[1])))


def _little(values: Values) -> float:
    """Return a bound below which a sum of squares is rounding error."""
    return float(abs(values).max() ** 2 * values.shape[-1] * np.finfo(float).eps ** 2 * 64)


def _ratio(above_B: Values, below_B: Values) -> Values:
    return np.divide(above_B, below_B, out=np.full(len(above_B), np.nan), where=below_B > 0)
