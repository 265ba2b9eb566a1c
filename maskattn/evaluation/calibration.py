"""Calibration: the temperature that a validation set asks for, and how often a confidence is right.

    q = softmax(log p / T),  T = argmin of the mean −log q[true class] over validation

Guo et al., On Calibration of Modern Neural Networks, ICML 2017. It changes no order within a patient, so no accuracy.
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
_LEAST = 1e-12  # of a probability, whose logarithm must be finite


@dataclass(frozen=True)
class Reliability:
    """How often patients of a like confidence are right, for each bin that has patients.

    Attributes:
        confidence: the mean confidence.
        right: the share that is right.
        low, high: Wilson's 95 % interval of that share, as if all rows of a patient were one.
        patients: how many there are.
    """

    confidence: Values
    right: Values
    low: Values
    high: Values
    patients: NDArray[np.int64]


def fit_temperature(validation: Predictions) -> float:
    """The temperature for which the validation set's true classes are likeliest.

    Raises:
        ValueError: the task has no classes.
    """
    from scipy.optimize import minimize_scalar

    if not validation.is_classification:
        raise ValueError(f"a temperature is for probabilities of classes, got a {validation.task} task")
    log_PK = _logarithms(validation.scores_PK)

    def loss(log_temperature: float) -> float:
        scaled_PK = log_PK / np.exp(log_temperature)
        peak_P = scaled_PK.max(1)
        total_P = peak_P + np.log(np.exp(scaled_PK - peak_P[:, None]).sum(1))
        return float((total_P - scaled_PK[np.arange(len(peak_P)), validation.truth]).mean())

    found = minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The same predictions with probabilities of this temperature; the chosen class stays.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature must be above 0, got {temperature}")
    scaled_PK = _logarithms(predictions.scores_PK) / temperature
    scaled_PK = np.exp(scaled_PK - scaled_PK.max(1, keepdims=True))
    return replace(predictions, scores_PK=scaled_PK / scaled_PK.sum(1, keepdims=True))


def reliability_of(predictions: Predictions) -> Reliability:
    """How often patients of a like confidence are right: of two classes whether they are of the second."""
    confidence_P, right_P = confidence_of(predictions)
    bin_P = np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], confidence_P, side="right")
    there = np.unique(bin_P)
    owners = np.array(predictions.owners)
    patients = np.array([len(np.unique(owners[bin_P == one])) for one in there])
    share = np.array([right_P[bin_P == one].mean() for one in there])
    low, high = _wilson(share, patients)
    return Reliability(np.array([confidence_P[bin_P == one].mean() for one in there]), share, low, high, patients)


def _wilson(share: Values, patients: NDArray[np.int64], z: float = 1.959964) -> tuple[Values, Values]:
    middle = (share + z**2 / (2 * patients)) / (1 + z**2 / patients)
    half = z * np.sqrt(share * (1 - share) / patients + z**2 / (4 * patients**2)) / (1 + z**2 / patients)
    return middle - half, middle + half


def _logarithms(scores_PK: Values) -> Values:
    return np.log(np.clip(scores_PK, _LEAST, None))
