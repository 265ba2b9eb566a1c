"""Tables of predictions, with the columns of STAMP's ``patient-preds.csv``, and ``fold`` if there are folds.

============== ====================================================================================
task           columns
============== ====================================================================================
classes        ``PATIENT``, the target, ``pred``, ``<target>_<class>`` for each class, ``loss``
regression     ``PATIENT``, the target, ``pred``, ``loss``
survival       ``PATIENT``, ``pred_score`` (earlier ``pred_risk``), ``time``, ``event``
============== ====================================================================================

If rows are slides or patches, ``PATIENT`` may occur several times, and ``sample_id`` names the row. ``loss`` is the
cross entropy of the row, or its absolute error.

Source: STAMP 2.4's ``modeling/deploy.py``, which sorts rows by the loss; ours keep their order.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import OutputError
from maskattn.evaluation.predictions import Predictions, Task, some_of
from maskattn.files import replacing

__all__ = ["CLASS_TASKS", "read_predictions", "read_rows", "write_predictions"]

CLASS_TASKS: tuple[Task, ...] = ("binary", "multiclass", "ordinal")
_PATIENT = ("PATIENT", "patient_id", "case_id", "patient")
_RISK = ("pred_score", "pred_risk")
_FOLD = "fold"
_SAMPLE = ("sample_id", "slide_id", "SLIDE")
_TRUE = {"1": True, "1.0": True, "true": True, "event": True, "dead": True, "yes": True}
_FALSE = {"0": False, "0.0": False, "false": False, "censored": False, "alive": False, "no": False}


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write predictions as a table.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(_lines(predictions))
    except OSError as error:
        raise OutputError(f"predictions must be written completely, got {path}: {error.strerror or error}") from error


def read_predictions(path: Path, task: Task | None = None, target: str | None = None) -> Predictions:
    """Read a table of predictions.

    Args:
        path: a CSV file.
        task: the task; None determines it from the columns: several classes are ordinal if their names are increasing
            numbers.
        target: the column of labels; None determines it from the columns.

    Raises:
        ValueError: columns are missing, a label is not a class, or :class:`Predictions` refuses the contents.
    """
    header, rows = read_rows(path)
    try:
        patient = _patient_column(header)
        if task == "survival" or (task is None and any(name in header for name in _RISK)):
            return _survival(header, rows, patient, target)
        if task is None or task in CLASS_TASKS:
            found = _class_columns(header, target)
            if found:
                return _of_classes(header, rows, patient, found, task)
            if task is not None:
                raise ValueError(
                    f"predictions of classes must have a column <target>_<class> for each class, got "
                    f"{_shown(header)}; name the target's column with --target"
                )
        return _regression(header, rows, patient, target)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the header and the rows of a CSV file as text; missing fields are empty.

    Raises:
        ValueError: the file cannot be read, or has no rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = [[field.strip() for field in record] for record in csv.reader(file)]
    except OSError as error:
        raise ValueError(f"a table must be a readable CSV file, got {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"a table must be a CSV file in UTF-8, got {path}: {error}; save it as CSV UTF-8 (comma delimited)"
        ) from error
    header, *rows = [record for record in records if any(record)] or [[]]
    if not rows:
        raise ValueError(f"a table must have a header and rows, got none in {path}")
    repeated = [name for name, count in Counter(header).items() if count > 1 and name]
    if repeated:
        raise ValueError(f"a table must have each column once, got several of {some_of(repeated)} in {path}; drop one")
    return header, [dict(itertools.zip_longest(header, row[: len(header)], fillvalue="")) for row in rows]


def _lines(predictions: Predictions) -> Iterator[Sequence[Any]]:
    folds, owners = predictions.fold_P, predictions.patient_of
    further = [] if folds is None else [_FOLD]
    further += [] if owners is None else [_SAMPLE[0]]
    if predictions.task == "survival":
        yield ["PATIENT", _RISK[0], "time", "event", *further]
    else:
        columns = [f"{predictions.target}_{name}" for name in predictions.classes]
        yield ["PATIENT", predictions.target, "pred", *columns, "loss", *further]
    for row, patient in enumerate(predictions.owners):
        scores = [float(score) for score in predictions.scores_PK[row]]
        last: list[Any] = [] if folds is None else [int(folds[row])]
        last += [] if owners is None else [predictions.patient_ids[row]]
        if predictions.task == "survival":
            yield [patient, *scores, float(predictions.times[row]), int(predictions.events[row]), *last]
        elif predictions.task == "regression":
            truth = float(predictions.truth[row])
            yield [patient, truth, *scores, abs(scores[0] - truth), *last]
        else:
            truth, chosen = predictions.truth[row], predictions.predicted[row]
            loss = -math.log(max(scores[truth], 1e-300))
            yield [patient, predictions.classes[truth], predictions.classes[chosen], *scores, loss, *last]


def _shown(header: Sequence[str]) -> str:
    return f"the columns {some_of(list(header), 12)}"


def _patient_column(header: Sequence[str]) -> str:
    by_name = {name.casefold(): name for name in reversed(header)}
    for name in _PATIENT:
        if name.casefold() in by_name:
            return by_name[name.casefold()]
    raise ValueError(f"a table of patients must have a column PATIENT, got {_shown(header)}")


def _class_columns(header: Sequence[str], target: str | None) -> tuple[str, list[str]] | None:
    """Return the target and its columns of scores; None if no column has any."""
    found = {}
    for name in header if target is None else [target]:
        columns = [other for other in header if other.startswith(f"{name}_") and name]
        if name in header and len(columns) > 1 and name != "pred":
            found[name] = columns
    if len(found) > 1:
        raise ValueError(
            f"a table must have one target with columns <target>_<class>, got {some_of(list(found))}; "
            "choose one with --target"
        )
    return next(iter(found.items()), None)


def _of_classes(
    header: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    patient: str,
    found: tuple[str, list[str]],
    task: Task | None,
) -> Predictions:
    target, columns = found
    classes = [name[len(target) + 1 :] for name in columns]
    if task is None:
        task = "binary" if len(classes) == 2 else "ordinal" if _rising(classes) else "multiclass"
    index = {name: position for position, name in enumerate(classes)}
    chosen = [row.get("pred", "") for row in rows]
    return Predictions(
        task=task,
        target=target,
        **_names(header, rows, patient),
        scores_PK=np.array([[_number(row[name]) for name in columns] for row in rows]),
        truth_P=np.array([_class_of(row[target], index, row[patient], target) for row in rows]),
        classes=tuple(classes),
        predicted_P=np.array(
            [_class_of(name, index, row[patient], "pred") for name, row in zip(chosen, rows, strict=True)]
        )
        if all(chosen)
        else None,
        fold_P=_folds(header, rows),
    )


def _regression(
    header: Sequence[str], rows: Sequence[Mapping[str, str]], patient: str, target: str | None
) -> Predictions:
    others = [name for name in header if name and name not in (patient, "pred", "loss", _FOLD, *_SAMPLE)]
    if "pred" not in header or (target is None and len(others) != 1) or (target is not None and target not in header):
        raise ValueError(
            "predictions must have the columns PATIENT, <target>, pred and, for classes, <target>_<class> for each; "
            f"for survival PATIENT, pred_score, time, event; got {_shown(header)}"
            + ("; name the target's column with --target" if target is None and len(others) > 1 else "")
        )
    target = others[0] if target is None else target
    return Predictions(
        task="regression",
        target=target,
        **_names(header, rows, patient),
        scores_PK=np.array([[_number(row["pred"])] for row in rows]),
        truth_P=np.array([_number(row[target]) for row in rows]),
        fold_P=_folds(header, rows),
    )


def _survival(
    header: Sequence[str], rows: Sequence[Mapping[str, str]], patient: str, target: str | None
) -> Predictions:
    risk = next((name for name in _RISK if name in header), None)
    if risk is None or "time" not in header or "event" not in header:
        raise ValueError(
            f"predictions of survival must have the columns PATIENT, pred_score, time, event, got {_shown(header)}"
        )
    events = []
    for row in rows:
        value = row["event"].casefold()
        if value not in _TRUE and value not in _FALSE:
            raise ValueError(f"an event must be 1 (observed) or 0 (censored), got {row['event']!r} for {row[patient]}")
        events.append(value in _TRUE)
    return Predictions(
        task="survival",
        target=target or "event",
        **_names(header, rows, patient),
        scores_PK=np.array([[_number(row[risk])] for row in rows]),
        time_P=np.array([_number(row["time"]) for row in rows]),
        event_P=np.array(events),
        fold_P=_folds(header, rows),
    )


def _names(header: Sequence[str], rows: Sequence[Mapping[str, str]], patient: str) -> dict[str, Any]:
    """Return the ids of the rows and, if rows are slides or patches, their patients, as arguments."""
    patients = tuple(row[patient] for row in rows)
    sample = next((name for name in _SAMPLE if name in header), None)
    if sample is None:
        return {"patient_ids": patients}
    return {"patient_ids": tuple(row[sample] for row in rows), "patient_of": patients}


def _number(text: str) -> float:
    if not text:
        return math.nan  # refused later, with the patient's name
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"a prediction must be a number, got {text!r}") from None


def _class_of(name: str, index: Mapping[str, int], patient: str, column: str) -> int:
    if name in index:
        return index[name]
    # A spreadsheet or pandas writes the class 2 as 2.0 if another row has no label.
    if name.endswith(".0") and name[:-2] in index:
        return index[name[:-2]]
    got = "no label" if name.casefold() in ("", "nan", "none", "na") else repr(name)
    raise ValueError(
        f"{column} must be one of the classes {some_of(list(index), 12)}, got {got} for {patient}; drop the rows "
        "without a label, and name classes as in the columns of scores"
    )


def _rising(classes: Sequence[str]) -> bool:
    try:
        numbers = [float(name) for name in classes]
    except ValueError:
        return False
    return all(low < high for low, high in itertools.pairwise(numbers))


def _folds(header: Sequence[str], rows: Sequence[Mapping[str, str]]) -> np.ndarray | None:
    if _FOLD not in header:
        return None
    try:
        return np.array([int(float(row[_FOLD])) for row in rows])
    except ValueError as error:
        raise ValueError(f"a fold must be a whole number, got {error}") from None
