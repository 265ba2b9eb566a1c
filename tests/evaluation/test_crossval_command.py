"""``maskattn crossval`` on small synthetic features: it finds what is there, and chance where labels are shuffled."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.evaluation import Predictions
from tests.training.small_cohorts import read_table, write_cohort, write_table

QUICK = ("--model", "mean", "--epochs", 6, "--lr", 0.05, "--resamples", 200, "--device", "cpu")


def run(features, labels, out, *more):
    arguments = ["crossval", "--features", features, "--labels", labels, "--out", out, *QUICK, *more]
    return CliRunner().invoke(app, list(map(str, arguments)))


def of_grade(features, labels, out, *more):
    return run(features, labels, out, "--task", "binary", "--target", "grade", *more)


def auc_of(out):
    return json.loads((out / "metrics.json").read_text())["models"][out.name]["metrics"]["auc"]


def test_folds_models_predictions_and_a_report_are_left_and_read_by_evaluate(tmp_path):
    features, labels = write_cohort(tmp_path, patients=24, slides_each=2)
    done = of_grade(features, labels, tmp_path / "cv", "--folds", 3)
    assert done.exit_code == 0, done.output
    out = tmp_path / "cv"
    assert auc_of(out)["value"] > 0.75
    assert auc_of(out)["low"] > 0.5
    for fold in range(3):
        assert (out / f"split-{fold}" / "model" / "config.json").is_file()
        assert Predictions.read_csv(out / f"split-{fold}" / "patient-preds.csv").patients == 8
    assert sorted(Predictions.read_csv(out / "patient-preds.csv").patient_ids) == [
        f"p{index:02}" for index in range(24)
    ]
    assert "Cross-validation: grade" in (out / "report.html").read_text()
    before = auc_of(out)
    evaluated = CliRunner().invoke(app, ["evaluate", str(out), "--out", str(tmp_path / "cv2"), "--resamples", "200"])
    assert evaluated.exit_code == 0, evaluated.output
    told = json.loads((tmp_path / "cv2" / "metrics.json").read_text())["models"]["cv"]
    assert told["metrics"]["auc"] == pytest.approx(before)
    assert [fold["fold"] for fold in told["by_fold"]] == [0, 1, 2]


def test_slides_that_count_for_themselves_have_intervals_over_their_patients(tmp_path):
    features, labels = write_cohort(tmp_path, patients=18, slides_each=2)
    out = tmp_path / "cv"
    done = of_grade(features, labels, out, "--folds", 3, "--fusion", "none")
    assert done.exit_code == 0, done.output
    assert "intervals are over the 18 patients" in " ".join(done.output.split())
    assert auc_of(out)["low"] < auc_of(out)["high"]
    read = Predictions.read_csv(out / "patient-preds.csv")
    assert (read.rows, read.patients) == (36, 18)
    assert all(name[1:3] == owner[1:] for name, owner in zip(read.patient_ids, read.owners, strict=True))
    evaluated = CliRunner().invoke(app, ["evaluate", str(out), "--out", str(tmp_path / "cv2"), "--resamples", "200"])
    assert "36 slides or patches of 18 patients" in evaluated.output
    told = json.loads((tmp_path / "cv2" / "metrics.json").read_text())["models"]["cv"]
    assert told["metrics"]["auc"] == pytest.approx(auc_of(out))


def test_the_same_command_goes_on_and_other_settings_are_refused(tmp_path):
    features, labels = write_cohort(tmp_path, patients=16)
    assert of_grade(features, labels, tmp_path / "cv", "--folds", 2).exit_code == 0
    first = (tmp_path / "cv" / "patient-preds.csv").read_text()
    (tmp_path / "cv" / "split-1" / "patient-preds.csv").unlink()
    assert of_grade(features, labels, tmp_path / "cv", "--folds", 2).exit_code == 0
    assert (tmp_path / "cv" / "patient-preds.csv").read_text() == first
    done = of_grade(features, labels, tmp_path / "cv", "--folds", 2, "--dropout", 0.3)
    assert done.exit_code == 2
    assert "dropout 0.1 instead of 0.3" in " ".join(done.output.split())


def test_shuffled_labels_give_chance(tmp_path):
    features, labels = write_cohort(tmp_path, patients=60, tiles=6)
    rows = read_table(labels)
    grades = np.random.default_rng(3).permutation([row["grade"] for row in rows])
    write_table(labels, [{**row, "grade": grade} for row, grade in zip(rows, grades, strict=True)])
    done = of_grade(features, labels, tmp_path / "cv", "--folds", 3)
    assert done.exit_code == 0, done.output
    auc = auc_of(tmp_path / "cv")
    assert auc["low"] < 0.5 < auc["high"]


def test_candidates_are_chosen_on_validation_and_may_not_change_the_cohort(tmp_path):
    features, labels = write_cohort(tmp_path, patients=16)
    (tmp_path / "still.yaml").write_text("lr: 1.0e-9\n")
    (tmp_path / "quick.yaml").write_text("lr: 0.05\n")
    files = ("--candidate", tmp_path / "still.yaml", "--candidate", tmp_path / "quick.yaml")
    done = of_grade(features, labels, tmp_path / "cv", "--folds", 2, *files)
    assert done.exit_code == 0, done.output
    told = [json.loads((tmp_path / "cv" / f"split-{fold}" / "choice.json").read_text()) for fold in (0, 1)]
    for choice in told:
        assert choice["validation"][choice["chosen"]] == max(choice["validation"].values())
    assert (tmp_path / "cv" / "split-0" / "model-still").is_dir()
    assert "Each fold's model was chosen on its validation part" in done.output
    assert "fold 0: AUC on its validation part: still" in " ".join(done.output.split())
    (tmp_path / "other.yaml").write_text("target: value\n")
    done = of_grade(features, labels, tmp_path / "cv2", "--candidate", tmp_path / "other.yaml")
    assert done.exit_code == 2
    assert "candidates must share" in " ".join(done.output.split())


def test_own_splits_are_used_and_a_leak_is_an_error_that_names_the_patient(tmp_path):
    features, labels = write_cohort(tmp_path, patients=12, slides_each=2)
    split_of = ("test", "test", "tune", "tune", *["train"] * 8)
    lines = ["fold,sample_id,split"]
    for fold in (0, 1):
        for patient in range(12):
            part = split_of[(patient + 2 * fold) % 12]
            lines += [f"{fold},s{patient:02}{slide},{part}" for slide in "ab"]
    (tmp_path / "splits.csv").write_text("\n".join(lines) + "\n")
    done = of_grade(features, labels, tmp_path / "cv", "--split", tmp_path / "splits.csv")
    assert done.exit_code == 0, done.output
    read = Predictions.read_csv(tmp_path / "cv" / "patient-preds.csv")
    assert sorted(read.patient_ids) == ["p00", "p01", "p10", "p11"]
    leak = (tmp_path / "splits.csv").read_text().replace("0,s05b,train", "0,s05b,test")
    (tmp_path / "splits.csv").write_text(leak)
    done = of_grade(features, labels, tmp_path / "cv2", "--split", tmp_path / "splits.csv")
    assert done.exit_code == 2
    assert "a patient must be in one part of a split, got p05 in two" in " ".join(done.output.split())


def test_values_and_survival_are_cross_validated(tmp_path):
    features, labels = write_cohort(tmp_path, patients=24)
    more = ("--task", "regression", "--target", "value", "--epochs", 20)
    done = run(features, labels, tmp_path / "cv", "--folds", 2, *more)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "cv" / "metrics.json").read_text())["models"]["cv"]["metrics"]["spearman"]["low"] > 0
    more = ("--task", "survival", "--time", "months", "--event", "death")
    done = run(features, labels, tmp_path / "death", "--folds", 2, *more)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "death" / "figures" / "death-kaplan-meier.svg").is_file()


@pytest.mark.parametrize(("folds", "told"), [(20, "got 16 patients for 20 folds"), (9, "got 8 patients of the rarest")])
def test_too_few_patients_for_the_folds_are_told_before_anything_is_trained(tmp_path, folds, told):
    features, labels = write_cohort(tmp_path, patients=16)
    done = of_grade(features, labels, tmp_path / "cv", "--folds", folds)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert not (tmp_path / "cv" / "split-0").exists()
