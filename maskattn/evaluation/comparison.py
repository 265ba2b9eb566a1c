"""Comparison of two models over the patients they share, by a paired bootstrap of the difference.

Each resample has the same patients for both models, so that what makes a patient hard for both cancels out. If each
slide has a row, a patient's slides are drawn together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from maskattn.evaluation.intervals import Estimate, distribution_of, draw_resamples, estimate_of
from maskattn.evaluation.metrics import check_evaluable, metrics_of
from maskattn.evaluation.predictions import Predictions, some_of

__all__ = ["Difference", "compare", "shared_patients", "strata_for"]


@dataclass(frozen=True)
class Difference:
    """A metric of two models.

    Attributes:
        metric: name of the metric.
        title: its title in the report.
        first: the first model's value over the shared patients; None if undefined.
        second: the second model's value; None if undefined.
        difference: second minus first, with its interval.
        p: two-sided p value of the hypothesis that the difference is 0; None if there is no interval.
    """

    metric: str
    title: str
    first: float | None
    second: float | None
    difference: Estimate
    p: float | None


def shared_patients(first: Predictions, second: Predictions) -> tuple[Predictions, Predictions]:
    """Return both models' predictions of the rows that both have, in the same order.

    Raises:
        ValueError: the tasks, targets or classes differ, fewer than two rows are in both, or a patient's labels differ.
    """
    for name, what in (("task", "task"), ("target", "target"), ("classes", "list of classes")):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise ValueError(
                f"models that are compared must have one {what}, got {one!r} and {other!r}; compare models that "
                "predict the same"
            )
    row_of = {patient: row for row, patient in enumerate(second.patient_ids)}
    rows = [row for row, patient in enumerate(first.patient_ids) if patient in row_of]
    if len(rows) < 2:
        raise ValueError(
            f"models that are compared must share patients, got {len(rows)} of {first.rows} and "
            f"{second.rows}; give predictions of the same test set"
        )
    left = first.of(rows)
    right = second.of([row_of[patient] for patient in left.patient_ids])
    for name in ("truth_P", "time_P", "event_P"):
        one, other = getattr(left, name), getattr(right, name)
        if one is not None and (one != other).any():
            unlike = [patient for patient, same in zip(left.patient_ids, one == other, strict=True) if not same]
            raise ValueError(
                f"a patient must have one label in all tables, got two for {some_of(unlike)}; correct the labels"
            )
    if left.patient_of is None or right.patient_of is None:
        known = left.patient_of or right.patient_of
        return replace(left, patient_of=known), replace(right, patient_of=known)
    if left.patient_of != right.patient_of:
        pairs = zip(left.patient_ids, left.patient_of, right.patient_of, strict=True)
        unlike = [name for name, one, other in pairs if one != other]
        raise ValueError(
            f"a row must have one patient in all tables, got two for {some_of(unlike)}; correct the column PATIENT"
        )
    return left, right


def compare(
    first: Predictions, second: Predictions, *, resamples: int = 1000, seed: int = 0, stratified: bool = False
) -> list[Difference]:
    """Compute the difference of every metric over the shared patients, with its interval and p value.

    Args:
        first: predictions of the first model.
        second: predictions of the second model.
        resamples: number of resamples.
        seed: seed of the bootstrap.
        stratified: resample within each class, or within those with and without an event.

    Raises:
        ValueError: see :func:`shared_patients` and :func:`~maskattn.evaluation.metrics.check_evaluable`.
    """
    left, right = shared_patients(first, second)
    check_evaluable(left)
    strata = strata_for(left) if stratified else None
    cluster_P = left.clusters
    weights_BP = draw_resamples(left.rows, resamples, seed, strata, cluster_P)
    found = []
    for metric in metrics_of(left.task):
        one = distribution_of(metric.prepared(left), weights_BP, cluster_P)
        other = distribution_of(metric.prepared(right), weights_BP, cluster_P)
        difference = other - one
        estimate = estimate_of(difference)
        p = None if estimate.low is None else difference.p_value()
        found.append(Difference(metric.name, metric.title, _value(one.value), _value(other.value), estimate, p))
    return found


def strata_for(predictions: Predictions) -> np.ndarray | None:
    """Return the strata of a bootstrap: the class, or whether there was an event; None for regression."""
    if predictions.is_classification:
        return predictions.truth
    return predictions.events.astype(np.int64) if predictions.task == "survival" else None


def _value(value: float) -> float | None:
    return value if np.isfinite(value) else None
