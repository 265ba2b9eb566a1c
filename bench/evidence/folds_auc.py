"""The AUC within the folds of a cross-validation, and its difference between two models.

Pooled over folds, the AUC also compares patients whose scores are of different models. A model that is too certain in
one fold and not in another then loses AUC without ranking the patients of any fold worse.

Dimension key: B bootstrap samples, P patients, X patients of the one class in a fold, Y of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation import Predictions

__all__ = ["auc_within_folds", "cells_within_folds", "difference_within_folds", "interval_within_folds"]

_SAMPLES = 2000


def auc_within_folds(predictions: Predictions) -> float:
    """Return the mean of the folds' AUCs, of the second of two classes."""
    return float(_of_samples(predictions, np.ones((1, predictions.rows)), predictions.patient_ids)[0])


def interval_within_folds(predictions: Predictions) -> tuple[float, float]:
    """Return a 95 % bootstrap interval over patients of the mean of the folds' AUCs."""
    aucs_B = _of_samples(predictions, _counts(predictions.patient_ids), predictions.patient_ids)[1:]
    low, high = np.quantile(aucs_B, (0.025, 0.975))
    return float(low), float(high)


def cells_within_folds(loop: Predictions, predictions: Predictions) -> tuple[str, str]:
    """Return the cells of a table: the mean AUC with its interval, and whether it is in the loop's interval."""
    auc, (low, high) = auc_within_folds(predictions), interval_within_folds(predictions)
    loop_low, loop_high = interval_within_folds(loop)
    inside = "yes" if loop_low <= auc <= loop_high else "no"
    return f"{auc:.3f} ({low:.3f} to {high:.3f})", "" if predictions is loop else inside


def difference_within_folds(first: Sequence[Predictions], second: Sequence[Predictions]) -> tuple[float, float, float]:
    """Return the mean of the AUC within folds of the second less that of the first, with a 95 % bootstrap interval.

    Args:
        first: predictions of the same patients by one kind of model, for each seed.
        second: those by the other, for the same seeds. A patient is drawn for all of them together.
    """
    patients = first[0].patient_ids
    count_BP = _counts(patients)
    differences_B = np.mean(
        [
            _of_samples(two, count_BP, patients) - _of_samples(one, count_BP, patients)
            for one, two in zip(first, second, strict=True)
        ],
        axis=0,
    )
    low, high = np.quantile(differences_B[1:], (0.025, 0.975))
    return float(differences_B[0]), float(low), float(high)


def _counts(patients: Sequence[str]) -> NDArray[np.float64]:
    """Return how often each patient is in each sample; the first is the cohort itself."""
    rng = np.random.default_rng(0)
    count_BP = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), _SAMPLES).astype(float)
    return np.concatenate([np.ones((1, len(patients))), count_BP])


def _of_samples(
    predictions: Predictions, count_BP: NDArray[np.float64], patients: Sequence[str]
) -> NDArray[np.float64]:
    """Return the mean of the folds' AUCs for each sample, in which ``patients`` occur ``count_BP`` times."""
    assert predictions.fold_P is not None, "the predictions are of a cross-validation"
    assert predictions.truth_P is not None, "classes have a truth"
    position = {patient: index for index, patient in enumerate(patients)}
    count_BP = count_BP[:, [position[patient] for patient in predictions.patient_ids]]
    score_P, aucs = predictions.scores_PK[:, 1], []
    for fold in np.unique(predictions.fold_P):
        inside_P = predictions.fold_P == fold
        positive_P, negative_P = inside_P & (predictions.truth_P == 1), inside_P & (predictions.truth_P == 0)
        apart_XY = score_P[positive_P][:, None] - score_P[negative_P]
        right_XY = (apart_XY > 0) + 0.5 * (apart_XY == 0)
        of_positive_BX, of_negative_BY = count_BP[:, positive_P], count_BP[:, negative_P]
        pairs_B = of_positive_BX.sum(1) * of_negative_BY.sum(1)
        aucs.append(((of_positive_BX @ right_XY) * of_negative_BY).sum(1) / pairs_B)
    mean_B: NDArray[np.float64] = np.mean(aucs, axis=0)
    return mean_B
