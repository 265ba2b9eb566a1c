"""Cross-validation: a model for each fold, chosen on the fold's validation part and evaluated on its test part.

The caller passes a :class:`Trainer`, because training is in a higher layer. An interrupted run is resumed fold by fold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from maskattn.errors import OutputError
from maskattn.evaluation.inputs import PREDICTIONS_CSV
from maskattn.evaluation.metrics import metrics_of
from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.split_files import read_splits, write_splits
from maskattn.evaluation.splits import Split
from maskattn.files import replacing

__all__ = ["CHOICE", "SPLITS", "FoldOutcome", "Trainer", "cross_validate", "pooled"]

SPLITS, CHOICE = "splits.csv", "choice.json"


class Trainer(Protocol):
    """The functions that train and predict; both resume interrupted work."""

    def train(self, candidate: str, split: Split, folder: Path) -> Predictions:
        """Train a candidate on a split without its test part, and return its predictions of the validation part."""

    def predict(self, folder: Path, patients: Sequence[str]) -> Predictions:
        """Return the predictions of a folder's model for some patients."""


@dataclass(frozen=True)
class FoldOutcome:
    """The outcome of a fold.

    Attributes:
        fold: index of the fold.
        chosen: the candidate that was chosen on the validation part.
        model: the folder of its model.
        validation: candidate → the task's first metric on the validation part; None if undefined.
        predictions: the chosen model's predictions of the test part.
    """

    fold: int
    chosen: str
    model: Path
    validation: dict[str, float | None]
    predictions: Predictions


def cross_validate(
    trainer: Trainer,
    candidates: Sequence[str],
    splits: Sequence[Split],
    out: Path,
    on_fold: Callable[[FoldOutcome], None] | None = None,
) -> list[FoldOutcome]:
    """Train, choose and predict, fold by fold.

    Args:
        trainer: trains and predicts.
        candidates: names of configurations; if there are several, each fold chooses one on its validation part.
        splits: the split of each fold; each must have a test part.
        out: folder of ``splits.csv`` and of a folder ``split-K`` for each fold, with its model or models, the test
            part's ``patient-preds.csv`` and ``choice.json``.
        on_fold: called after each fold.

    Raises:
        ValueError: a fold has no test part, or the folder has a run with other splits.
        OutputError: a file cannot be written.
    """
    for fold, split in enumerate(splits):
        if not split.test:
            raise ValueError(f"every fold of a cross-validation must have a test part, got none in fold {fold}; add it")
    _keep_splits(splits, out)
    outcomes = []
    for fold, split in enumerate(splits):
        outcome = _run_fold(trainer, candidates, fold, split, out / f"split-{fold}")
        outcomes.append(outcome)
        if on_fold is not None:
            on_fold(outcome)
    return outcomes


def pooled(outcomes: Sequence[FoldOutcome]) -> tuple[Predictions, tuple[str, ...]]:
    """Return the test predictions of all folds as one table, and notes on it.

    If folds are drawn independently (as CLAM's are), a patient may be in several test parts. The patient's
    probabilities or values are then averaged over the models that were not trained on the patient.

    Raises:
        ValueError: patients of a survival task are in several test parts, whose risks have different scales.
    """
    parts = [outcome.predictions.in_fold(outcome.fold) for outcome in outcomes]
    first = parts[0]
    names = [name for part in parts for name in part.patient_ids]
    if len(set(names)) == len(names):
        return Predictions.joined(parts), ()
    if first.task == "survival":
        raise ValueError(
            "test parts of a survival task must not share patients, because each model's risks have their own scale, "
            f"got {len(names) - len(set(names))} that are tested again; give splits that test each patient once"
        )
    rows: dict[str, list[tuple[Predictions, int]]] = {}
    for part in parts:
        for row, name in enumerate(part.patient_ids):
            rows.setdefault(name, []).append((part, row))
    scores = np.array([np.mean([part.scores_PK[row] for part, row in found], axis=0) for found in rows.values()])
    truth = np.array([found[0][0].truth[found[0][1]] for found in rows.values()])
    again = sum(len(found) > 1 for found in rows.values())
    note = (
        f"{again} of {len(rows)} patients are in several folds' test parts; their scores are averaged over those "
        "models, so a single model may be worse: see the table by fold."
    )
    owners = tuple(found[0][0].owners[found[0][1]] for found in rows.values())
    one = replace(
        first,
        patient_ids=tuple(rows),
        scores_PK=scores,
        truth_P=truth,
        predicted_P=None,
        fold_P=None,
        patient_of=owners if any(part.patient_of is not None for part in parts) else None,
    )
    return one, (note,)


def _keep_splits(splits: Sequence[Split], out: Path) -> None:
    path = out / SPLITS
    if path.is_file():
        if _sets_of(read_splits(path, _Same())) != _sets_of(splits):
            raise ValueError(
                f"a cross-validation is resumed with its own splits, got splits that differ from those in {path}; give "
                "the same labels, --folds, --seed and --split, or name another --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_splits(splits, path)


class _Same(dict[str, str]):
    """A mapping of every name to itself, including names that are no longer patients."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return name


def _sets_of(splits: Sequence[Split]) -> list[tuple[set[str], ...]]:
    return [(set(split.train), set(split.validation), set(split.test)) for split in splits]


def _run_fold(trainer: Trainer, candidates: Sequence[str], fold: int, split: Split, folder: Path) -> FoldOutcome:
    folders = {name: folder / ("model" if len(candidates) == 1 else f"model-{name}") for name in candidates}
    # A finished training is only read, which also checks that the settings of a resumed run have not changed.
    predicted = {name: trainer.train(name, split, folders[name]) for name in candidates}
    validation = {name: _first_metric(found) for name, found in predicted.items()}
    chosen = _best(validation, predicted[candidates[0]])
    path = folder / PREDICTIONS_CSV
    if path.is_file() and _choice_of(folder) == chosen:
        one = predicted[chosen]
        predictions = Predictions.read_csv(path, one.task, None if one.task == "survival" else one.target)
        predictions = replace(predictions, target=one.target)
    else:
        predictions = trainer.predict(folders[chosen], split.test)
        predictions.write_csv(path)
        _write_choice(folder, chosen, validation, predicted[chosen])
    return FoldOutcome(fold, chosen, folders[chosen], validation, predictions)


def _first_metric(predictions: Predictions) -> float | None:
    metric = metrics_of(predictions.task)[0]
    value = metric.prepared(predictions)(np.ones((1, predictions.rows)))[0]
    return float(value) if np.isfinite(value) else None


def _best(validation: Mapping[str, float | None], predictions: Predictions) -> str:
    """Return the candidate with the best value, the first of equals; one without a value is chosen last."""
    sign = 1 if metrics_of(predictions.task)[0].better == "higher" else -1
    known = {name: -np.inf if value is None else sign * value for name, value in validation.items()}
    return max(known, key=known.__getitem__)


def _choice_of(folder: Path) -> str | None:
    path = folder / CHOICE
    if not path.is_file():
        return None
    found: str = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    return found


def _write_choice(folder: Path, chosen: str, validation: Mapping[str, float | None], predictions: Predictions) -> None:
    metric = metrics_of(predictions.task)[0].name
    text = json.dumps({"chosen": chosen, "metric": metric, "validation": dict(validation)}, indent=2)
    try:
        with replacing(folder / CHOICE) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{CHOICE} must be written completely, got {folder}: {error.strerror or error}") from error
