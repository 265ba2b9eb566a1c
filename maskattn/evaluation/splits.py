"""Splits of the patients into training, validation and test parts; no patient is in two parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation.predictions import Task, some_of

__all__ = ["LeakError", "Split", "check_classes", "grouped_folds", "inner_split", "strata_of"]


class LeakError(ValueError):
    """A patient is in two parts of a split."""


@dataclass(frozen=True)
class Split:
    """The patients of one fold.

    Attributes:
        train: ids of the patients on whose slides a model is trained.
        validation: ids of the patients that choose the epoch, the model and the temperature.
        test: ids of the patients on which the result is measured; may be empty.

    Raises:
        LeakError: a patient is in two parts.
        ValueError: the training or validation part is empty.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = Counter(patient for part in parts.values() for patient in set(part))
        repeated = sorted(patient for patient, count in counts.items() if count > 1)
        if repeated:
            where = " and ".join(name for name, part in parts.items() if repeated[0] in part)
            raise LeakError(
                f"a patient must be in one part of a split, got {some_of(repeated)} in two ({repeated[0]} in {where}); "
                "put all slides of a patient into one part"
            )
        for name in ("train", "validation"):
            if not parts[name]:
                raise ValueError(f"a split must have patients in its {name} part, got none")


def strata_of(task: Task, labels: Sequence[Any] | NDArray[Any], folds: int) -> NDArray[Any]:
    """Return the strata of a split: the class, whether there was an event, or the quantile of a value.

    Args:
        task: one of :data:`~maskattn.evaluation.TASKS`.
        labels: a class, a value or an event (bool) for each slide or patient.
        folds: number of parts that each stratum must fill.

    Returns:
        The stratum of each label, int64.
    """
    given = np.asarray(labels)
    if task == "regression":
        bins = max(1, min(5, len(given) // max(folds, 1)))
        ranks = np.argsort(np.argsort(given, kind="stable"), kind="stable")
        return ranks * bins // len(given)
    return np.unique(given.astype(bool) if task == "survival" else given, return_inverse=True)[1]


def grouped_folds(
    patients: Sequence[str],
    strata: Sequence[Any] | NDArray[Any],
    folds: int,
    seed: int = 0,
    validation_share: float = 0.2,
) -> list[Split]:
    """Draw stratified folds of patients; each patient is in the test part of one fold.

    Args:
        patients: the patient of each slide (or each patient once).
        strata: the stratum of each slide, of :func:`strata_of`.
        folds: number of folds, 2 or more.
        seed: seed of the shuffle.
        validation_share: share of the patients outside the test part for validation.

    Returns:
        A split for each fold.

    Raises:
        ValueError: there are too few patients for the folds, in total or in a stratum.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    names, kinds = np.asarray(patients, dtype=object), np.asarray(strata)
    _check_enough(names, kinds, folds)
    cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = []
    for fold, (rest, test) in enumerate(cut.split(np.zeros(len(names)), kinds, names)):
        train, validation = inner_split(names[rest], kinds[rest], validation_share, seed + fold)
        splits.append(Split(train, validation, _ordered(names[test])))
    return splits


def inner_split(
    patients: Sequence[str] | NDArray[Any], strata: Sequence[Any] | NDArray[Any], share: float = 0.2, seed: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw stratified training and validation parts of patients.

    Args:
        patients: the patient of each slide (or each patient once).
        strata: the stratum of each slide, of :func:`strata_of`.
        share: share of the patients for validation.
        seed: seed of the shuffle.

    Returns:
        The ids of the training and of the validation patients.

    Raises:
        ValueError: the share leaves a part empty, or there are too few patients.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if not 0 < share < 1:
        raise ValueError(f"the share for validation must be between 0 and 1, got {share}")
    names, kinds = np.asarray(patients, dtype=object), np.asarray(strata)
    # A part of n has the share 1/n; for a share above one half, validation takes the remainder.
    parts = max(2, round(1 / min(share, 1 - share)))
    _check_enough(names, kinds, 2)
    parts = min(parts, _rarest(names, kinds)[1])
    cut = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    large, small = next(cut.split(np.zeros(len(names)), kinds, names))
    if share > 0.5:
        large, small = small, large
    return _ordered(names[large]), _ordered(names[small])


def check_classes(splits: Sequence[Split], label_of: Mapping[str, Any]) -> list[str]:
    """Check that every part has every class, or patients with and without an event.

    Args:
        splits: the split of each fold.
        label_of: patient → class, or whether there was an event.

    Returns:
        A sentence for each test part that lacks a class; metrics by fold may be undefined for it.

    Raises:
        ValueError: a training or validation part lacks a class that another part has.
    """
    everything = sorted(set(label_of.values()), key=str)
    notes = []
    for fold, split in enumerate(splits):
        for name in ("train", "validation", "test"):
            part = getattr(split, name)
            present = {label_of[patient] for patient in part}
            missing = [str(label) for label in everything if label not in present]
            if part and missing and name != "test":
                raise ValueError(
                    f"every class must be in the {name} part of every fold, got none of {some_of(missing)} in fold "
                    f"{fold}; use fewer folds, more patients, or leave the class out"
                )
            if part and missing:
                notes.append(f"the test part of fold {fold} has no patient of {some_of(missing)}")
    return notes


def _ordered(patients: NDArray[Any]) -> tuple[str, ...]:
    return tuple(sorted(set(map(str, patients))))


def _rarest(names: NDArray[Any], kinds: NDArray[Any]) -> tuple[Any, int]:
    """Return the stratum with the fewest patients, and their number."""
    patients_of = {kind: len(set(names[kinds == kind])) for kind in np.unique(kinds)}
    rarest = min(patients_of, key=patients_of.__getitem__)
    return rarest, patients_of[rarest]


def _check_enough(names: NDArray[Any], kinds: NDArray[Any], folds: int) -> None:
    if folds < 2:
        raise ValueError(f"there must be 2 folds or more, got {folds}")
    patients = len(set(names))
    if patients < folds:
        raise ValueError(
            f"there must be a patient for each fold, got {patients} patients for {folds} folds; use fewer folds"
        )
    kind, fewest = _rarest(names, kinds)
    if fewest < folds:
        raise ValueError(
            f"every class must have a patient in every fold, got {fewest} patients of the rarest ({kind}) for {folds} "
            "folds; use fewer folds, or leave the class out"
        )
