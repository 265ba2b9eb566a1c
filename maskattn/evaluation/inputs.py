"""The inputs of ``maskattn evaluate``: files of predictions or folders of folds, and names for the models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from maskattn.evaluation.prediction_file import read_predictions
from maskattn.evaluation.predictions import Predictions, Task

__all__ = ["PREDICTIONS_CSV", "model_names", "read_model"]

PREDICTIONS_CSV = "patient-preds.csv"
_FOLD = re.compile(r"(?:split|fold)[-_](\d+)")


def read_model(path: Path, task: Task | None = None, target: str | None = None) -> Predictions:
    """Read the predictions of a file, or of the folds in a folder.

    Args:
        path: a table of predictions, or a folder with ``patient-preds.csv`` or, as STAMP's and our cross-validation
            write it, with ``split-0/patient-preds.csv``, ``split-1/patient-preds.csv`` and so on.
        task, target: the task and the column of labels, if the columns do not determine them.

    Raises:
        ValueError: there are no predictions, or a patient is in the test part of two folds.
    """
    if not path.is_dir():
        return read_predictions(path, task, target)
    if (path / PREDICTIONS_CSV).is_file():
        return read_predictions(path / PREDICTIONS_CSV, task, target)
    folds = {
        int(match[1]): file
        for file in path.glob(f"*/{PREDICTIONS_CSV}")
        if (match := _FOLD.fullmatch(file.parent.name)) is not None
    }
    if not folds:
        raise ValueError(
            f"a folder of predictions must have {PREDICTIONS_CSV} or split-0/{PREDICTIONS_CSV}, got neither in {path}; "
            "name the file"
        )
    parts = [read_predictions(folds[fold], task, target).in_fold(fold) for fold in sorted(folds)]
    try:
        return Predictions.joined(parts)
    except ValueError as error:
        raise ValueError(f"{error} (folds in {path})") from error


def model_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each model: the shortest end of its path that distinguishes it, without the usual file name."""
    all_parts = [_parts(path) for path in paths]
    longest = max(map(len, all_parts))
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in all_parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts)} ({number})" for number, parts in enumerate(all_parts, 1)]


def _parts(path: Path) -> tuple[str, ...]:
    resolved = path.resolve().with_suffix("") if path.suffix == ".csv" else path.resolve()
    parts = resolved.parts[1:]
    return parts[:-1] if len(parts) > 1 and path.name == PREDICTIONS_CSV else parts
