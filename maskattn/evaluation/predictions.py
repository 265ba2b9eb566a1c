"""A model's predictions with the true labels: a row for each patient, or for each of a patient's slides or patches.

Dimension key: P rows, K scores per row (classes, or one value or risk).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["TASKS", "Predictions", "Task", "some_of"]

Task = Literal["binary", "multiclass", "ordinal", "regression", "survival"]
TASKS: tuple[Task, ...] = ("binary", "multiclass", "ordinal", "regression", "survival")
"""The tasks; for "ordinal" the classes are in order."""

_SUM_TOLERANCE = 1e-3  # for probabilities that were printed with four decimals


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of patients, with their true labels.

    Attributes:
        task: one of :data:`TASKS`.
        target: the name of the target, a column of the labels.
        patient_ids: P distinct ids, of patients or, with ``patient_of``, of their slides or patches.
        scores_PK: (P, K) float64; probabilities of the classes, or one value (regression) or log risk (survival).
        truth_P: (P,) index of the true class (int64), or the true value (float64); None for survival.
        classes: K names, in the order of the scores; empty for regression and survival.
        predicted_P: (P,) index of the class that the model chose; None is replaced by that of the highest score.
        time_P: (P,) float64, for survival: the time to the event or to censoring.
        event_P: (P,) bool, for survival: whether the event was observed.
        fold_P: (P,) int64, the fold whose test part has the row; None if there are no folds.
        patient_of: P ids, the patient of each slide or patch; None if each row is a patient. Rows of one patient are
            correlated, so the bootstrap draws them together.

    Raises:
        ValueError: shapes differ, an id occurs twice, a number is not finite, or scores are not probabilities.
    """

    task: Task
    target: str
    patient_ids: tuple[str, ...]
    scores_PK: NDArray[np.float64]
    truth_P: NDArray[Any] | None = None
    classes: tuple[str, ...] = ()
    predicted_P: NDArray[np.int64] | None = None
    time_P: NDArray[np.float64] | None = None
    event_P: NDArray[np.bool_] | None = None
    fold_P: NDArray[np.int64] | None = None
    patient_of: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"a task must be one of {', '.join(TASKS)}, got {self.task!r}")
        of_classes = self.task in ("binary", "multiclass", "ordinal")
        kinds: dict[str, Any] = {"scores_PK": np.float64, "time_P": np.float64, "event_P": bool, "fold_P": np.int64}
        kinds |= {"truth_P": np.int64 if of_classes else np.float64, "predicted_P": np.int64}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=kind))
        object.__setattr__(self, "patient_ids", tuple(map(str, self.patient_ids)))
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        if self.patient_of is not None:
            object.__setattr__(self, "patient_of", tuple(map(str, self.patient_of)))
        self._check_shapes(of_classes)
        self._check_patients()
        if of_classes:
            self._check_classes()
            if self.predicted_P is None:
                object.__setattr__(self, "predicted_P", self.scores_PK.argmax(1))
        elif self.task == "survival" and self.times.min() < 0:
            early = some_of([one for one, time in zip(self.patient_ids, self.times, strict=True) if time < 0])
            raise ValueError(f"a time to an event must be 0 or more, got less for {early}; measure it from one origin")

    @property
    def rows(self) -> int:
        """P, the number of rows."""
        return len(self.patient_ids)

    @property
    def patients(self) -> int:
        """The number of patients, who may have several rows each."""
        return len(set(self.owners))

    @property
    def owners(self) -> tuple[str, ...]:
        """The patient of each row."""
        return self.patient_ids if self.patient_of is None else self.patient_of

    @property
    def clusters(self) -> NDArray[np.int64] | None:
        """(P,) the index of each row's patient, in order of first occurrence; None if each row is a patient."""
        if self.patient_of is None:
            return None
        number = {patient: index for index, patient in enumerate(dict.fromkeys(self.patient_of))}
        return np.array([number[patient] for patient in self.patient_of])

    @property
    def is_classification(self) -> bool:
        """Whether the task has classes."""
        return bool(self.classes)

    @property
    def truth(self) -> NDArray[Any]:
        """(P,) the true classes or values; not for survival."""
        assert self.truth_P is not None
        return self.truth_P

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(P,) the index of the class that the model chose, for a task with classes."""
        assert self.predicted_P is not None
        return self.predicted_P

    @property
    def times(self) -> NDArray[np.float64]:
        """(P,) the times of a survival task."""
        assert self.time_P is not None
        return self.time_P

    @property
    def events(self) -> NDArray[np.bool_]:
        """(P,) whether the event of a survival task was observed."""
        assert self.event_P is not None
        return self.event_P

    def of(self, rows: NDArray[Any] | Sequence[int]) -> Predictions:
        """Return the predictions of some rows, given as indices, in their order, or as a (P,) bool."""
        indices = np.arange(self.rows)[np.asarray(rows)]
        columns = ("scores_PK", "truth_P", "predicted_P", "time_P", "event_P", "fold_P")
        given = {name: getattr(self, name) for name in columns}
        kept: dict[str, Any] = {name: None if value is None else value[indices] for name, value in given.items()}
        names = tuple(self.patient_ids[row] for row in indices)
        owners = None if self.patient_of is None else tuple(self.patient_of[row] for row in indices)
        return replace(self, patient_ids=names, patient_of=owners, **kept)

    def in_fold(self, fold: int) -> Predictions:
        """Return the predictions with the index of their fold."""
        return replace(self, fold_P=np.full(self.rows, fold))

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Join the predictions of several folds.

        Raises:
            ValueError: tasks, targets or classes differ, or an id is in two of them.
        """
        first = parts[0]
        for part in parts[1:]:
            for name in ("task", "target", "classes"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(
                        f"predictions that are joined must have one {name}, got {getattr(first, name)!r} and "
                        f"{getattr(part, name)!r}; join those of one run"
                    )
        columns = ("scores_PK", "truth_P", "predicted_P", "time_P", "event_P", "fold_P")
        values = {name: [getattr(part, name) for part in parts] for name in columns}
        joined: dict[str, Any] = {
            name: None if any(x is None for x in some) else np.concatenate(some) for name, some in values.items()
        }
        names = tuple(one for part in parts for one in part.patient_ids)
        owners = tuple(one for part in parts for one in part.owners)
        by_slide = any(part.patient_of is not None for part in parts)
        return replace(first, patient_ids=names, patient_of=owners if by_slide else None, **joined)

    def write_csv(self, path: Path) -> None:
        """Write a table like STAMP's ``patient-preds.csv``; see :mod:`maskattn.evaluation.prediction_file`."""
        from maskattn.evaluation.prediction_file import write_predictions

        write_predictions(self, path)

    @classmethod
    def read_csv(cls, path: Path, task: Task | None = None, target: str | None = None) -> Predictions:
        """Read a table; see :func:`maskattn.evaluation.prediction_file.read_predictions`."""
        from maskattn.evaluation.prediction_file import read_predictions

        return read_predictions(path, task, target)

    def _check_shapes(self, of_classes: bool) -> None:
        patients = self.rows
        width = len(self.classes) if of_classes else 1
        if self.scores_PK.shape != (patients, width):
            raise ValueError(
                f"scores must be (patients, {'classes' if of_classes else '1'}) = {(patients, width)}, got "
                f"{self.scores_PK.shape}"
            )
        needed = ("time_P", "event_P") if self.task == "survival" else ("truth_P",)
        for name in ("truth_P", "predicted_P", "time_P", "event_P", "fold_P"):
            value = getattr(self, name)
            if name in needed and value is None:
                raise ValueError(f"predictions of a {self.task} task must have {name}, got none")
            if value is not None and value.shape != (patients,):
                raise ValueError(f"{name} must have a value for each of {patients} patients, got {value.shape}")
        if self.patient_of is not None and len(self.patient_of) != patients:
            raise ValueError(f"patient_of must name a patient for each of {patients} rows, got {len(self.patient_of)}")
        if not patients:
            raise ValueError("predictions must be of at least one patient, got none")

    def _check_patients(self) -> None:
        repeated = [one for one, count in Counter(self.patient_ids).items() if count > 1]
        if repeated:
            raise ValueError(
                f"a patient must have one row, got several of {some_of(repeated)}; "
                "join a patient's slides into one prediction, name each in a column sample_id, or give each fold's "
                "file separately"
            )
        numbers = [self.scores_PK.sum(1), self.truth_P, self.time_P]
        not_finite = ~np.array([np.isfinite(one) for one in numbers if one is not None]).all(0)
        if not_finite.any():
            named = some_of([self.patient_ids[row] for row in np.flatnonzero(not_finite)])
            raise ValueError(
                f"labels and predictions must be finite numbers, got NaN, infinity or nothing for {named}; "
                "drop these rows, or correct the program that wrote them"
            )

    def _check_classes(self) -> None:
        classes = len(self.classes)
        if len(set(self.classes)) < max(classes, 2) or (self.task == "binary" and classes != 2):
            rule = "two" if self.task == "binary" else "two or more"
            got = ", ".join(self.classes) or "none"
            raise ValueError(f"a {self.task} task must have {rule} classes of different names, got {got}")
        for name in ("truth_P", "predicted_P"):
            value = getattr(self, name)
            if value is not None and not ((value >= 0) & (value < classes)).all():
                raise ValueError(f"{name} must be indices of {classes} classes, got {value.min()} to {value.max()}")
        outside = ((self.scores_PK < -1e-6) | (self.scores_PK > 1 + 1e-6)).any(1)
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise ValueError(
                f"scores of classes must be probabilities from 0 to 1, got {_row(self.scores_PK[row])} for "
                f"{self.patient_ids[row]} ({outside.sum()} of {self.rows} patients); give them after the softmax"
            )
        wrong_sum = abs(self.scores_PK.sum(1) - 1) > _SUM_TOLERANCE
        if wrong_sum.any():
            row = int(np.flatnonzero(wrong_sum)[0])
            raise ValueError(
                f"a patient's probabilities must sum to 1, got {self.scores_PK[row].sum():.4g} for "
                f"{self.patient_ids[row]} ({wrong_sum.sum()} of {self.rows} patients); a column of a class may be "
                "missing, or the scores may not be a softmax"
            )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message: the first few, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _row(scores: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{score:.4g}" for score in scores[:6]) + (", …)" if len(scores) > 6 else ")")
