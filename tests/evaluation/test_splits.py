"""Patients are in one part, folds are stratified, and what cannot be split is told."""

from __future__ import annotations

import numpy as np
import pytest

from maskattn.evaluation import LeakError, Split, grouped_folds, strata_of
from maskattn.evaluation.splits import check_classes


def slides_of(patients: int, seed: int = 0):
    """Patients of one to four slides, and the label of each slide."""
    draw = np.random.default_rng(seed)
    names = np.repeat([f"p{index:03}" for index in range(patients)], draw.integers(1, 5, patients))
    label_of = {name: index % 3 for index, name in enumerate(dict.fromkeys(names))}
    return list(names), [label_of[name] for name in names], label_of


@pytest.mark.parametrize("folds", [2, 5])
def test_every_patient_is_tested_once_and_never_in_two_parts(folds):
    patients, labels, label_of = slides_of(60)
    splits = grouped_folds(patients, labels, folds, seed=3)
    assert len(splits) == folds
    assert sorted(patient for split in splits for patient in split.test) == sorted(label_of)
    for split in splits:
        assert sorted((*split.train, *split.validation, *split.test)) == sorted(label_of)
    assert check_classes(splits, label_of) == []


def test_folds_are_stratified_and_the_seed_decides():
    patients, labels, label_of = slides_of(60)
    splits = grouped_folds(patients, labels, 5, seed=3)
    for split in splits:
        counts = np.bincount([label_of[patient] for patient in split.test], minlength=3)
        assert counts.max() - counts.min() <= 3
    assert grouped_folds(patients, labels, 5, seed=3) == splits
    assert grouped_folds(patients, labels, 5, seed=4) != splits


def test_a_quarter_for_validation_is_a_quarter():
    patients = [f"p{index}" for index in range(100)]
    for split in grouped_folds(patients, [0, 1] * 50, 5, validation_share=0.25):
        assert len(split.validation) == 20
        assert len(split.train) == 60


def test_values_are_stratified_by_quantile_and_survival_by_event():
    values = np.random.default_rng(0).normal(size=100)
    strata = strata_of("regression", values, 5)
    assert np.bincount(strata).tolist() == [20] * 5
    assert all(values[strata == low].max() <= values[strata == low + 1].min() for low in range(4))
    assert strata_of("survival", [1, 0, 1], 2).tolist() == [1, 0, 1]
    assert strata_of("multiclass", ["b", "a", "b"], 2).tolist() == [1, 0, 1]


def test_a_patient_in_two_parts_is_an_error_that_names_the_patient():
    with pytest.raises(LeakError, match=r"got b in two \(b in train and test\)"):
        Split(("a", "b"), ("c",), ("b", "d"))


@pytest.mark.parametrize(
    ("patients", "labels", "folds", "told"),
    [
        (["a", "b", "c"], [0, 0, 0], 5, "got 3 patients for 5 folds"),
        (["a", "b", "c", "d", "e", "e"], [0, 0, 0, 0, 1, 1], 2, r"got 1 patients of the rarest \(1\) for 2 folds"),
        (["a", "b"], [0, 0], 1, "2 folds or more, got 1"),
    ],
)
def test_too_few_patients_for_the_folds_are_told(patients, labels, folds, told):
    with pytest.raises(ValueError, match=told):
        grouped_folds(patients, labels, folds)


def test_a_class_that_a_part_lacks_is_told():
    label_of = dict(zip("abcdef", (0, 1, 0, 1, 0, 0), strict=True))
    with pytest.raises(ValueError, match="every class must be in the validation part of every fold, got none of 1"):
        check_classes([Split(("a", "b"), ("c",), ("d",))], label_of)
    assert check_classes([Split(("a", "b"), ("c", "d"), ("e", "f"))], label_of) == [
        "the test part of fold 0 has no patient of 1"
    ]
