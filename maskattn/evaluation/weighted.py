"""Metrics of weighted patients: of many resamples at once, since a resample is how often each patient was drawn.

Every function takes ``weights_BP``, (B, P) counts of P patients in B resamples, and gives B values: the metric of each
resample as scikit-learn, scipy or scikit-survival would compute it of the patients repeated as often. NaN where the
metric is not defined there. With weights of 1 it is the metric of the patients themselves.

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
_TIED_RISK = 1e-8  # as scikit-survival has it
_MOST_PAIRS = 4_000_000  # of a block of the pairs of patients: 32 MB


def mean_of(values_P: Values) -> Weighted:
    """The mean of a value of each patient."""
    return lambda weights_BP: weights_BP @ values_P / weights_BP.sum(1)


def confusion(truth_P: NDArray[np.int64], predicted_P: NDArray[np.int64], classes: int) -> Weighted:
    """(B, K, K) counts: rows are the true classes, columns the predicted ones."""
    cells = np.zeros((len(truth_P), classes * classes))
    cells[np.arange(len(truth_P)), truth_P * classes + predicted_P] = 1
    return lambda weights_BP: (weights_BP @ cells).reshape(-1, classes, classes)


def area_under_roc(positive_P: NDArray[np.bool_], score_P: Values) -> Weighted:
    """Area under the ROC curve: the share of pairs that are in order, those with equal scores counted half."""
    order, starts = _groups(score_P)

    def weighted(weights_BP: Values) -> Values:
        positive_BG, negative_BG = _both(weights_BP, positive_P, order, starts)
        below_BG = negative_BG.cumsum(1) - negative_BG / 2
        pairs_B = positive_BG.sum(1) * negative_BG.sum(1)
        return _ratio((positive_BG * below_BG).sum(1), pairs_B)

    return weighted


def average_precision(positive_P: NDArray[np.bool_], score_P: Values) -> Weighted:
    """Average precision: precision at each score, weighted by what recall gains there."""
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
    """Harrell's concordance index: the share of comparable pairs whose risks are in order, equal risks counted half.

    Two patients are comparable where the one with the shorter time had the event; of equal times, where one had it and
    the other was seen without it. With folds, only patients of one fold are compared: each fold's model has a scale of
    its own.
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
    """Coefficient of determination: 1 less the squared errors as a share of the squared distances from the mean."""

    def weighted(weights_BP: Values) -> Values:
        centred_P = truth_P - truth_P.mean()  # else a large mean would cost digits
        mean_B = weights_BP @ centred_P / weights_BP.sum(1)
        spread_B = weights_BP @ centred_P**2 - weights_BP.sum(1) * mean_B**2
        return 1 - _ratio(weights_BP @ (truth_P - value_P) ** 2, np.where(spread_B > _little(truth_P), spread_B, 0))

    return weighted


def pearson(one_P: Values, other_P: Values) -> Weighted:
    """Pearson's correlation."""
    return lambda weights_BP: _correlation(weights_BP, one_P[None], other_P[None])


def spearman(one_P: Values, other_P: Values) -> Weighted:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    groups = _groups(one_P), _groups(other_P)

    def weighted(weights_BP: Values) -> Values:
        ranks = [_ranks(weights_BP, order, starts) for order, starts in groups]
        return _correlation(weights_BP, *ranks)

    return weighted


def calibration_error(confidence_P: Values, correct_P: NDArray[np.bool_], bins: int) -> Weighted:
    """Expected calibration error: how far the share that is correct is from the confidence, over equal bins of it."""
    bin_P = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence_P, side="right")
    members = np.zeros((len(bin_P), bins))
    members[np.arange(len(bin_P)), bin_P] = correct_P - confidence_P

    def weighted(weights_BP: Values) -> Values:
        return abs(weights_BP @ members).sum(1) / weights_BP.sum(1)

    return weighted


def _groups(score_P: Values) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of rising scores, and where in it each group of equal scores starts."""
    order = np.argsort(score_P, kind="stable")
    ordered = score_P[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _both(
    weights_BP: Values, positive_P: NDArray[np.bool_], order: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[Values, Values]:
    """The weights of positive and of negative patients in each group."""
    ordered_BP = weights_BP[:, order]
    all_BG = np.add.reduceat(ordered_BP, starts, axis=1)
    positive_BG = np.add.reduceat(ordered_BP * positive_P[order], starts, axis=1)
    return positive_BG, all_BG - positive_BG


def _ranks(weights_BP: Values, order: NDArray[np.int64], starts: NDArray[np.int64]) -> Values:
    """(B, P) the rank of each patient's value in each resample, from 1."""
    weight_BG = np.add.reduceat(weights_BP[:, order], starts, axis=1)
    middle_BG = weight_BG.cumsum(1) - (weight_BG - 1) / 2
    group_of = np.empty(len(order), dtype=np.int64)
    group_of[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    return middle_BG[:, group_of]


def _correlation(weights_BP: Values, one: Values, other: Values) -> Values:
    """Pearson's correlation of values that are (1, P), or (B, P) where they differ by resample."""
    total_B = weights_BP.sum(1)
    little = _little(one), _little(other)
    one = one - ((weights_BP * one).sum(1) / total_B)[:, None]
    other = other - ((weights_BP * other).sum(1) / total_B)[:, None]
    covariance_B = (weights_BP * one * other).sum(1)
    spreads_B = (weights_BP * one**2).sum(1), (weights_BP * other**2).sum(1)
    flat_B = (spreads_B[0] <= little[0]) | (spreads_B[1] <= little[1])
    return _ratio(covariance_B, np.where(flat_B, 0, np.sqrt(spreads_B[0] * spreads_B[1])))


def _little(values: Values) -> float:
    """A sum of squares that is rounding alone."""
    return float(abs(values).max() ** 2 * values.shape[-1] * np.finfo(float).eps ** 2 * 64)


def _ratio(above_B: Values, below_B: Values) -> Values:
    return np.divide(above_B, below_B, out=np.full(len(above_B), np.nan), where=below_B > 0)
