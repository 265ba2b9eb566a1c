"""The evaluation of one model: every metric with its interval, by class and by fold, and notes on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from maskattn.evaluation.calibration import fit_temperature, with_temperature
from maskattn.evaluation.comparison import Difference, strata_for
from maskattn.evaluation.intervals import LEVEL, Estimate, draw_resamples, estimate
from maskattn.evaluation.metrics import Metric, check_evaluable, metrics_of, metrics_of_class, present_classes
from maskattn.evaluation.predictions import Predictions, some_of
from maskattn.evaluation.weighted import Values

__all__ = ["ClassResult", "Evaluation", "FoldResult", "as_json", "evaluate_predictions", "with_positive"]

# With fewer patients, BCa intervals of kappa and the C-index covered the truth in 92 to 94 % of simulations.
FEW_PATIENTS = 100
_RARE = 10
_FOLDS_APART = 0.005  # the loss of AUC by pooling from which it is noted
_OF_CALIBRATION = ("brier", "ece")


@dataclass(frozen=True)
class ClassResult:
    """A class against the rest: its name, its number of patients, and its metrics."""

    name: str
    patients: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class FoldResult:
    """The test part of a fold: its index, its number of patients, and each metric's value; None if undefined."""

    fold: int
    patients: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a model.

    Attributes:
        name: name of the model.
        predictions: the predictions.
        metrics: the metrics by name.
        by_class: results by class; empty for tasks without classes.
        by_fold: results by fold; empty without folds.
        temperature: the temperature fitted on validation patients; None if none were given.
        calibrated: Brier score and calibration error with that temperature.
        resamples: number of resamples of the bootstrap.
        seed: seed of the bootstrap.
        stratified: whether it was drawn within each class, or within those with and without an event.
        notes: notes on the results, one sentence each.
    """

    name: str
    predictions: Predictions
    metrics: dict[str, Estimate]
    by_class: tuple[ClassResult, ...]
    by_fold: tuple[FoldResult, ...]
    temperature: float | None
    calibrated: dict[str, Estimate]
    resamples: int
    seed: int
    stratified: bool
    notes: tuple[str, ...]


def evaluate_predictions(
    predictions: Predictions,
    name: str = "model",
    *,
    validation: Predictions | None = None,
    resamples: int = 1000,
    seed: int = 0,
    stratified: bool = False,
    folds: Sequence[Predictions] | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Measure the predictions of a model.

    Args:
        predictions: predictions of the test patients.
        name: name of the model.
        validation: predictions of other patients, on which a temperature is fitted.
        resamples: number of resamples of the bootstrap over patients.
        seed: seed of the bootstrap.
        stratified: draw within each class, or within those with and without an event.
        folds: the predictions of each fold; None takes those of ``fold_P``, if there are any.
        notes: further notes on the results.

    Raises:
        ValueError: no metric is defined, or validation has other classes or shares patients with the test.
    """
    check_evaluable(predictions)
    if resamples < 100:
        raise ValueError(f"a bootstrap must have 100 resamples or more, got {resamples}; 1,000 are usual")
    strata = strata_for(predictions) if stratified else None
    weights_BP = draw_resamples(predictions.rows, resamples, seed, strata, predictions.clusters)
    metrics = {one.name: _estimate(one, predictions, weights_BP) for one in metrics_of(predictions.task)}
    by_fold = _by_fold(predictions, folds)
    temperature = _temperature(predictions, validation)
    return Evaluation(
        name=name,
        predictions=predictions,
        metrics=metrics,
        by_class=_by_class(predictions, weights_BP),
        by_fold=by_fold,
        temperature=temperature,
        calibrated={} if temperature is None else _calibrated(predictions, temperature, weights_BP),
        resamples=resamples,
        seed=seed,
        stratified=stratified,
        notes=(*_notes(predictions, metrics, by_fold), *notes),
    )


def with_positive(predictions: Predictions, positive: str) -> Predictions:
    """Return predictions of two classes with the named one second, which makes it the positive one.

    Raises:
        ValueError: there are not two classes, or none has this name.
    """
    if predictions.task != "binary" or positive not in predictions.classes:
        raise ValueError(
            f"the positive class must be one of two, got {positive!r} of "
            f"{', '.join(predictions.classes) or 'a task without classes'}"
        )
    if predictions.classes[1] == positive:
        return predictions
    return replace(
        predictions,
        classes=predictions.classes[::-1],
        scores_PK=predictions.scores_PK[:, ::-1].copy(),
        truth_P=1 - predictions.truth,
        predicted_P=1 - predictions.predicted,
    )


def as_json(
    evaluations: Sequence[Evaluation], comparisons: Sequence[tuple[str, str, list[Difference]]]
) -> dict[str, Any]:
    """Return the contents of ``metrics.json``."""
    return {
        "interval": LEVEL,
        "method": "BCa bootstrap over patients",
        "models": {one.name: _one_as_json(one) for one in evaluations},
        "comparisons": [
            {"first": first, "second": second, "differences": [asdict(one) for one in differences]}
            for first, second, differences in comparisons
        ],
    }


def _one_as_json(one: Evaluation) -> dict[str, Any]:
    shown = ("metrics", "calibrated")
    return {
        "task": one.predictions.task,
        "target": one.predictions.target,
        "patients": one.predictions.patients,
        "rows": one.predictions.rows,
        "classes": list(one.predictions.classes),
        "resamples": one.resamples,
        "seed": one.seed,
        "stratified": one.stratified,
        **{name: {key: asdict(value) for key, value in getattr(one, name).items()} for name in shown},
        "temperature": one.temperature,
        "by_class": [asdict(result) for result in one.by_class],
        "by_fold": [asdict(result) for result in one.by_fold],
        "notes": list(one.notes),
    }


def _estimate(metric: Metric, predictions: Predictions, weights_BP: Values) -> Estimate:
    return estimate(metric.prepared(predictions), weights_BP, cluster_P=predictions.clusters)


def _patients_of(predictions: Predictions, index: int) -> int:
    """Return the number of patients with a class."""
    return len({predictions.owners[row] for row in np.flatnonzero(predictions.truth == index)})


def _by_class(predictions: Predictions, weights_BP: Values) -> tuple[ClassResult, ...]:
    if not predictions.is_classification:
        return ()
    results = []
    for index, name in enumerate(predictions.classes):
        found = {one.name: _estimate(one, predictions, weights_BP) for one in metrics_of_class(index)}
        results.append(ClassResult(name, _patients_of(predictions, index), found))
    return tuple(results)


def _by_fold(predictions: Predictions, folds: Sequence[Predictions] | None) -> tuple[FoldResult, ...]:
    fold_P = predictions.fold_P
    numbers = list(range(len(folds or ()))) if fold_P is None else [int(fold) for fold in np.unique(fold_P)]
    if folds is None:
        folds = [] if fold_P is None else [predictions.of(fold_P == fold) for fold in numbers]
    results = []
    for fold, part in zip(numbers, folds, strict=True):
        found = {one.name: _of_fold(one, part, predictions) for one in metrics_of(predictions.task)}
        results.append(FoldResult(fold, part.patients, found))
    return tuple(results)


def _of_fold(metric: Metric, fold: Predictions, all_folds: Predictions) -> float | None:
    """Return the metric of a fold; None if it is undefined because the fold lacks a class of the others."""
    if metric.name in _NEEDS_CLASSES and fold.is_classification and present_classes(fold) != present_classes(all_folds):
        return None
    value = metric.prepared(fold)(np.ones((1, fold.rows)))[0]
    return float(value) if np.isfinite(value) else None


_NEEDS_CLASSES = ("auc", "average_precision", "balanced_accuracy")


def _temperature(predictions: Predictions, validation: Predictions | None) -> float | None:
    if validation is None:
        return None
    if validation.classes != predictions.classes or not predictions.is_classification:
        raise ValueError(
            f"validation must have the classes of the test, got {', '.join(validation.classes) or 'none'} and "
            f"{', '.join(predictions.classes) or 'none'}; give predictions of the same model"
        )
    both = sorted(set(validation.owners) & set(predictions.owners))
    if both:
        raise ValueError(
            f"validation must have other patients than the test, got {some_of(both)} in both; a temperature that is "
            "fitted on the test patients does not show their calibration"
        )
    return fit_temperature(validation)


def _calibrated(predictions: Predictions, temperature: float, weights_BP: Values) -> dict[str, Estimate]:
    scaled = with_temperature(predictions, temperature)
    asked = [one for one in metrics_of(predictions.task) if one.name in _OF_CALIBRATION]
    return {one.name: _estimate(one, scaled, weights_BP) for one in asked}


def _notes(predictions: Predictions, metrics: Mapping[str, Estimate], by_fold: Sequence[FoldResult]) -> list[str]:
    notes = []
    if predictions.patient_of is not None:
        notes.append(
            f"Each of {predictions.rows:,} slides or patches counts once; intervals are over the "
            f"{predictions.patients:,} patients, whose rows are drawn together."
        )
    if predictions.is_classification:
        counts = [_patients_of(predictions, index) for index in range(len(predictions.classes))]
        absent = [name for name, count in zip(predictions.classes, counts, strict=True) if not count]
        if absent:
            notes.append(f"No patient is of {some_of(absent)}, which means over classes leave out.")
        rare = [
            f"{name} ({count})" for name, count in zip(predictions.classes, counts, strict=True) if 0 < count < _RARE
        ]
        if rare:
            notes.append(f"Fewer than {_RARE} patients are of {some_of(rare)}, so its metrics are uncertain.")
        if predictions.fold_P is not None:
            notes.append(
                "Metrics are of all folds' test patients together, although each fold has its own model; the table by "
                "fold has each model's metrics."
            )
            notes += _note_on_scales(metrics["auc"].value, by_fold)
    if predictions.patients < FEW_PATIENTS:
        notes.append(
            f"{predictions.patients} patients are few: below {FEW_PATIENTS}, a 95 % interval may cover only 92 %."
        )
    dropped = {name: found.dropped for name, found in metrics.items() if found.dropped}
    if dropped:
        counts_text = ", ".join(f"{name} {count:,}" for name, count in dropped.items())
        notes.append(f"Resamples that lack a class, in which a metric is undefined, were left out: {counts_text}.")
    return notes


def _note_on_scales(pooled: float | None, by_fold: Sequence[FoldResult]) -> list[str]:
    """Return a note if the AUC of all folds together is below the folds' own, because their scores differ in scale."""
    aucs = [auc for result in by_fold if (auc := result.metrics["auc"]) is not None]
    if pooled is None or len(aucs) < 2 or np.mean(aucs) - pooled < _FOLDS_APART:
        return []
    return [
        f"The AUC of all folds together is {pooled:.3f}, the mean of the folds' AUCs {np.mean(aucs):.3f}. Scores of "
        "the folds' models differ in scale or offset; the mean tells how well a model ranks patients."
    ]
