"""Kaplan-Meier curves of patients at low and at high risk, and the log-rank test between them.

If each slide has a row, a patient counts once, with the mean risk of the slides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.weighted import Values

__all__ = ["RiskGroup", "log_rank", "risk_groups"]


@dataclass(frozen=True)
class RiskGroup:
    """The Kaplan-Meier curve of patients at low or at high risk.

    Attributes:
        name: "low risk" or "high risk".
        times: (T,) the times of events and censorings, starting with 0.
        surviving: (T,) the share without the event after each time.
        low, high: (T,) its log-log 95 % interval.
        observed: (P,) each patient's time.
        patients: number of patients.
        events: number of events.
    """

    name: str
    times: Values
    surviving: Values
    low: Values
    high: Values
    observed: Values
    patients: int
    events: int

    def at_risk(self, time: float) -> int:
        """Return the number of patients at risk at a time."""
        return int((self.observed >= time).sum())


def _of_patients(predictions: Predictions) -> Predictions:
    """Return one row per patient, with the time and the event of the first slide and the mean of the slides' risks."""
    cluster_P = predictions.clusters
    if cluster_P is None:
        return predictions
    first = np.unique(cluster_P, return_index=True)[1]
    risk_P = np.bincount(cluster_P, predictions.scores_PK[:, 0]) / np.bincount(cluster_P)
    return replace(predictions.of(first), scores_PK=risk_P[:, None], patient_of=None)


def high_risk(predictions: Predictions) -> NDArray[np.bool_]:
    """Return (P,) bool: whether a risk is above the median, or above that of its fold if there are folds."""
    risk_P = predictions.scores_PK[:, 0]
    folds = np.zeros(len(risk_P), dtype=np.int64) if predictions.fold_P is None else predictions.fold_P
    high_P = np.zeros(len(risk_P), dtype=bool)
    for fold in np.unique(folds):
        members = folds == fold
        high_P[members] = risk_P[members] > np.median(risk_P[members])
    return high_P


def risk_groups(predictions: Predictions) -> list[RiskGroup]:
    """Return the curves of the patients at low and at high risk; an empty list if all risks are equal."""
    from sksurv.nonparametric import kaplan_meier_estimator

    predictions = _of_patients(predictions)
    high_P = high_risk(predictions)
    if not high_P.any():
        return []
    groups = []
    for name, members in (("low risk", ~high_P), ("high risk", high_P)):
        event, time = predictions.events[members], predictions.times[members]
        at, share, (low, high) = kaplan_meier_estimator(event, time, conf_type="log-log")
        # The log-log interval is NaN before the first event.
        low, high = np.where(np.isfinite(low), low, share), np.where(np.isfinite(high), high, share)
        one = np.ones(1)
        groups.append(
            RiskGroup(
                name=name,
                times=np.concatenate([[0.0], at]),
                surviving=np.concatenate([one, share]),
                low=np.concatenate([one, low]),
                high=np.concatenate([one, high]),
                observed=time,
                patients=len(time),
                events=int(event.sum()),
            )
        )
    return groups


def log_rank(predictions: Predictions) -> float | None:
    """Return the p value of the log-rank test between the groups; None without two groups or without events."""
    from sksurv.compare import compare_survival

    predictions = _of_patients(predictions)
    high_P = high_risk(predictions)
    if not high_P.any() or not predictions.events.any():
        return None
    outcome = np.array(
        list(zip(predictions.events, predictions.times, strict=True)), dtype=[("event", bool), ("time", float)]
    )
    _, p = compare_survival(outcome, high_P)
    return float(p)
