"""Cross-validation with a trainer that only draws: what is trained on whom, chosen by what, and what goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from maskattn.evaluation import Predictions, Split, grouped_folds
from maskattn.evaluation.crossval import CHOICE, SPLITS, cross_validate, pooled
from maskattn.evaluation.results import evaluate_predictions

PATIENTS = [f"p{index:02}" for index in range(40)]
LABEL_OF = {patient: index % 2 for index, patient in enumerate(PATIENTS)}


class Drawing:
    """Candidates whose scores are right in a share of the patients; it remembers whom it was given."""

    def __init__(self, right, task="binary"):
        self.right, self.task, self.trained, self.asked = right, task, [], []

    def train(self, candidate, split, folder):
        self.trained.append((candidate, split))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "candidate").write_text(candidate)
        return self.said(candidate, split.validation)

    def predict(self, folder, patients):
        candidate = (folder / "candidate").read_text()
        self.asked.append((candidate, tuple(patients)))
        return self.said(candidate, patients)

    def said(self, candidate, patients):
        draw = np.random.default_rng(len(patients))
        truth = np.array([LABEL_OF[patient] for patient in patients])
        told = np.where(draw.random(len(truth)) < self.right[candidate], truth, 1 - truth)
        if self.task == "survival":
            time = np.arange(len(truth)) + 1.0
            risk = np.where(told, -time, time)[:, None]
            return Predictions("survival", "death", patients, risk, time_P=time, event_P=np.ones(len(truth)))
        scores = np.eye(2)[told] * 0.6 + 0.2
        return Predictions("binary", "grade", patients, scores, truth, ("low", "high"))


def splits(folds=4):
    return grouped_folds(PATIENTS, list(LABEL_OF.values()), folds)


def test_each_fold_leaves_what_stamp_would_and_all_patients_are_predicted_once(tmp_path):
    trainer = Drawing({"model": 0.9})
    outcomes = cross_validate(trainer, ["model"], splits(), tmp_path)
    whole, notes = pooled(outcomes)
    assert notes == ()
    assert sorted(whole.patient_ids) == PATIENTS
    for fold, split in enumerate(splits()):
        read = Predictions.read_csv(tmp_path / f"split-{fold}" / "patient-preds.csv")
        assert read.patient_ids == split.test
        assert whole.of(whole.fold_P == fold).patient_ids == split.test
        assert (tmp_path / f"split-{fold}" / "model" / "candidate").is_file()
    assert (tmp_path / SPLITS).is_file()


def test_validation_of_the_fold_chooses_and_the_test_part_is_asked_of_the_chosen_alone(tmp_path):
    trainer = Drawing({"bad": 0.1, "good": 0.9, "even": 0.5})
    outcomes = cross_validate(trainer, list(trainer.right), splits(), tmp_path)
    assert [outcome.chosen for outcome in outcomes] == ["good"] * 4
    assert [candidate for candidate, _ in trainer.asked] == ["good"] * 4
    assert [patients for _, patients in trainer.asked] == [split.test for split in splits()]
    assert len(trainer.trained) == 12
    told = json.loads((tmp_path / "split-0" / CHOICE).read_text())
    assert told["chosen"] == "good"
    assert told["metric"] == "auc"
    assert told["validation"]["good"] > told["validation"]["bad"]


def test_a_run_goes_on_with_the_folds_that_it_lacks(tmp_path):
    class Killed(Drawing):
        def predict(self, folder, patients):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().predict(folder, patients)

    with pytest.raises(KeyboardInterrupt):
        cross_validate(Killed({"model": 0.8}), ["model"], splits(), tmp_path)
    again = Drawing({"model": 0.8})
    outcomes = cross_validate(again, ["model"], splits(), tmp_path)
    assert [patients for _, patients in again.asked] == [split.test for split in splits()[2:]]
    fresh, _ = pooled(cross_validate(Drawing({"model": 0.8}), ["model"], splits(), tmp_path / "fresh"))
    whole, _ = pooled(outcomes)
    assert whole.patient_ids == fresh.patient_ids
    assert np.array_equal(whole.scores_PK, fresh.scores_PK)
    assert whole.target == fresh.target


def test_other_splits_than_those_it_began_with_are_refused(tmp_path):
    cross_validate(Drawing({"model": 0.8}), ["model"], splits(), tmp_path)
    with pytest.raises(ValueError, match="is resumed with its own splits, got splits that differ"):
        cross_validate(Drawing({"model": 0.8}), ["model"], splits(5), tmp_path)


def test_a_fold_without_a_test_part_is_refused_before_anything_is_trained(tmp_path):
    trainer = Drawing({"model": 0.8})
    with pytest.raises(ValueError, match="must have a test part, got none in fold 1"):
        cross_validate(trainer, ["model"], [splits()[0], Split(("p00",), ("p01",))], tmp_path)
    assert trainer.trained == []


def test_patients_of_several_test_parts_are_averaged_and_it_is_said(tmp_path):
    first, second = splits(2)
    # Monte-Carlo splits: two of the first fold's patients are tested again.
    twice = first.test[:2]
    second = Split(
        tuple(name for name in second.train if name not in twice),
        tuple(name for name in second.validation if name not in twice),
        (*second.test, *twice),
    )
    overlapping = [first, second]
    outcomes = cross_validate(Drawing({"model": 0.8}), ["model"], overlapping, tmp_path)
    whole, notes = pooled(outcomes)
    assert "2 of 40 patients are in several folds' test parts" in notes[0]
    assert sorted(whole.patient_ids) == PATIENTS
    name = twice[0]
    both = [one.predictions.scores_PK[one.predictions.patient_ids.index(name)] for one in outcomes]
    assert np.allclose(whole.scores_PK[whole.patient_ids.index(name)], np.mean(both, axis=0))
    found = evaluate_predictions(whole, folds=[one.predictions for one in outcomes], notes=notes, resamples=100)
    assert [fold.patients for fold in found.by_fold] == [20, 22]
    assert notes[0] in found.notes
    survival = cross_validate(Drawing({"model": 0.8}, "survival"), ["model"], overlapping, tmp_path / "survival")
    with pytest.raises(ValueError, match=r"must not share patients.* got 2 that are tested again"):
        pooled(survival)
