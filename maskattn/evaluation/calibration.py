"""Calibration: temperature scaling on a validation set, and reliability diagrams.

    q = softmax(log p / T),  T = argmin of the mean −log q[true class] over validation

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. The order of a patient's classes does not
change, and hence neither does the accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation.metrics import CALIBRATION_BINS, confidence_of
from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.weighted import Values

__all__ = ["Reliability", "fit_temperature", "reliability_of", "with_temperature"]

_RANGE = (0.05, 20.0)
_LEAST = 1e-12  # probabilities are clipped to it, so that their logarithms are finite


@dataclass(frozen=True)
class Reliability:
    """The points of a reliability diagram, one for each bin of confidence that has patients.

    Attributes:
        confidence: the mean confidence of each bin.
        right: the share of rows that are right.
        low, high: Wilson's 95 % interval of that share, with all rows of a patient counted as one.
        patients: number of patients in each bin.
    """

    confidence: Values
    right: Values
    low: Values
    high: Values
    patients: NDArray[np.int64]


def fit_temperature(validation: Predictions) -> float:
    """Fit the temperature that maximises the likelihood of the validation set's true classes.

    Raises:
        ValueError: the task has no classes.
    """
    from scipy.optimize import minimize_scalar

    if not validation.is_classification:
        raise ValueError(f"a temperature needs probabilities of classes, got a {validation.task} task")
    log_PK = _logarithms(validation.scores_PK)

    def loss(log_temperature: float) -> float:
        scaled_PK = log_PK / np.exp(log_temperature)
        peak_P = scaled_PK.max(1)
        total_P = peak_P + np.log(np.exp(scaled_PK - peak_P[:, None]).sum(1))
        return float((total_P - scaled_PK[np.arange(len(peak_P)), validation.truth]).mean())

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Return the predictions with their probabilities scaled by a temperature; the chosen class stays.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature must be above 0, got {temperature}")
    scaled_PK = _logarithms(predictions.scores_PK) / temperature
    scaled_PK = np.exp(scaled_PK - scaled_PK.max(1, keepdims=True))
    return replace(predictions, scores_PK=scaled_PK / scaled_PK.sum(1, keepdims=True))


def reliability_of(predictions: Predictions) -> Reliability:
    """Compute the reliability diagram: of the second of two classes, or of the likeliest of several."""
    confidence_P, right_P = confidence_of(predictions)
    bin_P = np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], confidence_P, side="right")
    filled = np.unique(bin_P)
    owners = np.array(predictions.owners)
    patients = np.array([len(np.unique(owners[bin_P == one])) for one in filled])
    share = np.array([right_P[bin_P == one].mean() for one in filled])
    low, high = _wilson(share, patients)
    return Reliability(np.array([confidence_P[bin_P == one].mean() for one in filled]), share, low, high, patients)


def _wilson(share: Values, patients: NDArray[np.int64], z: float = 1.959964) -> tuple[Values, Values]:
    middle = (share + z**2 / (2 * patients)) / (1 + z**2 / patients)
    half = z * np.sqrt(share * (1 - share) / patients + z**2 / (4 * patients**2)) / (1 + z**2 / patients)
    return middle - half, middle + half


def _logarithms(scores_PK: Values) -> Values:
    return np.log(np.clip(scores_PK, _LEAST, None))
