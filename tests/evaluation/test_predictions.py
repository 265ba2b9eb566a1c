"""Predictions hold together, and their table is STAMP's."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from maskattn.evaluation import Predictions


def of_classes(**changes):
    given = {
        "task": "multiclass",
        "target": "grade",
        "patient_ids": ("001", "002", "003"),
        "scores_PK": [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]],
        "truth_P": [0, 1, 1],
        "classes": ("low", "mid", "high"),
    }
    return Predictions(**(given | changes))


def of_survival(**changes):
    given = {
        "task": "survival",
        "target": "death",
        "patient_ids": ("a", "b"),
        "scores_PK": [[0.5], [-1.25]],
        "time_P": [12.0, 30.5],
        "event_P": [True, False],
    }
    return Predictions(**(given | changes))


def of_values(**changes):
    given = {"task": "regression", "target": "age", "patient_ids": ("a", "b"), "scores_PK": [[1.5], [2.0]]}
    return Predictions(**(given | {"truth_P": [1.0, 2.5]} | changes))


def same(one: Predictions, other: Predictions) -> bool:
    plain = all(getattr(one, name) == getattr(other, name) for name in ("task", "patient_ids", "classes"))
    columns = ("scores_PK", "truth_P", "predicted_P", "time_P", "event_P", "fold_P")
    return plain and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)


def columns_of(path):
    with path.open() as file:
        return next(csv.reader(file))


def test_classes_are_written_in_stamps_columns_and_read_back(tmp_path):
    path = tmp_path / "patient-preds.csv"
    of_classes().write_csv(path)
    assert columns_of(path) == ["PATIENT", "grade", "pred", "grade_low", "grade_mid", "grade_high", "loss"]
    row = path.read_text().splitlines()[1].split(",")
    assert row[:3] == ["001", "low", "low"]
    assert float(row[-1]) == pytest.approx(-np.log(0.7))
    assert same(Predictions.read_csv(path), of_classes())


def test_values_and_survival_are_written_in_stamps_columns_and_read_back(tmp_path):
    path = tmp_path / "patient-preds.csv"
    values = Predictions("regression", "age", ("a", "b"), np.array([[1.5], [2.0]]), np.array([1.0, 2.5]))
    values.write_csv(path)
    assert columns_of(path) == ["PATIENT", "age", "pred", "loss"]
    assert same(Predictions.read_csv(path), values)
    of_survival().write_csv(path)
    assert columns_of(path) == ["PATIENT", "pred_score", "time", "event"]
    assert same(Predictions.read_csv(path), of_survival())


def test_folds_are_one_more_column(tmp_path):
    path = tmp_path / "preds.csv"
    whole = Predictions.joined([of_classes().in_fold(0), of_classes(patient_ids=("4", "5", "6")).in_fold(1)])
    whole.write_csv(path)
    assert columns_of(path)[-1] == "fold"
    assert Predictions.read_csv(path).fold_P.tolist() == [0, 0, 0, 1, 1, 1]


def test_slides_of_a_patient_are_rows_that_say_whose_they_are(tmp_path):
    path = tmp_path / "preds.csv"
    slides = of_classes(patient_of=("p1", "p1", "p2"))
    assert (slides.rows, slides.patients) == (3, 2)
    assert slides.clusters.tolist() == [0, 0, 1]
    slides.in_fold(1).write_csv(path)
    assert columns_of(path)[-2:] == ["fold", "sample_id"]
    assert [line.split(",")[0] for line in path.read_text().splitlines()[1:]] == ["p1", "p1", "p2"]
    read = Predictions.read_csv(path)
    assert same(read, slides.in_fold(1))
    assert read.owners == slides.owners
    assert slides.of([2, 0]).owners == ("p2", "p1")
    joined = Predictions.joined([slides, of_classes(patient_ids=("4", "5", "6"))])
    assert joined.owners == ("p1", "p1", "p2", "4", "5", "6")
    for other in (of_survival(patient_of=("p", "p")), of_values(patient_of=("p", "p"))):
        other.write_csv(path)
        again = Predictions.read_csv(path)
        assert same(again, other)
        assert again.owners == ("p", "p")
    with pytest.raises(ValueError, match="a patient for each of 3 rows, got 1"):
        of_classes(patient_of=("p1",))


def test_tables_that_stamp_wrote_earlier_are_read(tmp_path):
    path = tmp_path / "preds.csv"
    path.write_text("PATIENT,pred_risk,time,event,cut_off=0.5\na,0.25,12.0,1,\nb,-1,3,0,\n")
    read = Predictions.read_csv(path)
    assert read.task == "survival"
    assert read.scores_PK[:, 0].tolist() == [0.25, -1.0]
    assert read.events.tolist() == [True, False]


def test_classes_that_are_rising_numbers_are_ordinal_and_two_are_binary(tmp_path):
    path = tmp_path / "preds.csv"
    of_classes(classes=("0", "1", "2")).write_csv(path)
    assert Predictions.read_csv(path).task == "ordinal"
    assert Predictions.read_csv(path, task="multiclass").task == "multiclass"
    path.write_text("PATIENT,msi,pred,msi_0,msi_1,loss\na,0.0,0,0.75,0.25,\nb,1.0,1,0.5,0.5,\n")
    read = Predictions.read_csv(path)
    assert read.task == "binary"
    assert read.truth.tolist() == [0, 1]
    assert read.predicted.tolist() == [0, 1]  # as the file says, also where scores are equal


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("who,grade,pred\na,1,1\n", "must have a column PATIENT, got the columns who, grade, pred"),
        ("PATIENT,grade\na,1\n", "must have the columns PATIENT, <target>, pred"),
        ("PATIENT,age,site,pred\na,1,2,3\n", "name the target's column with --target"),
        ("PATIENT,pred_score,time\na,1,1\n", "pred_score, time, event, got the columns PATIENT, pred_score, time"),
        ("PATIENT,pred_score,time,event\na,1,1,maybe\n", "1 .observed. or 0 .censored., got 'maybe' for a"),
        ("PATIENT,pred_score,time,event\na,1,-2,1\n", "must be 0 or more, got less for a"),
        ("PATIENT,g,pred,g_x,g_y\na,x,x,1,0\na,y,y,0,1\n", "one row, got several of a"),
        ("PATIENT,g,pred,g_x,g_y\na,x,x,0.9,0.3\nb,y,y,0,1\n", r"sum to 1, got 1.2 for a \(1 of 2 patients\)"),
        ("PATIENT,g,pred,g_x,g_y\na,x,x,1.5,-0.5\n", r"from 0 to 1, got \(1.5, -0.5\) for a"),
        ("PATIENT,g,pred,g_x,g_y\na,x,x,nan,0.5\n", "finite numbers, got NaN, infinity or nothing for a"),
        ("PATIENT,g,pred,g_x,g_y\na,,x,0.5,0.5\n", "one of the classes x, y, got no label for a"),
        ("PATIENT,g,pred,g_x,g_y\na,z,x,0.5,0.5\n", "one of the classes x, y, got 'z' for a"),
        ("PATIENT,age,pred\na,1,\n", "got NaN, infinity or nothing for a"),
        ("PATIENT,age,pred\na,1,old\n", "must be a number, got 'old'"),
        ("PATIENT,age,pred\n", "must have a header and rows"),
        ("PATIENT,age,pred,fold\na,1,1,first\n", "a fold must be a whole number"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_sentence_that_names_the_file(tmp_path, text, told):
    path = tmp_path / "preds.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        Predictions.read_csv(path)
    assert "preds.csv" in str(error.value)


def test_a_table_that_is_not_there_or_no_text_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"readable CSV file.*No such file"):
        Predictions.read_csv(tmp_path / "absent.csv")
    (tmp_path / "workbook.csv").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ValueError, match="CSV file in UTF-8"):
        Predictions.read_csv(tmp_path / "workbook.csv")


def test_rows_are_chosen_with_all_that_belongs_to_them():
    chosen = of_classes(fold_P=[0, 1, 2]).of([2, 0])
    assert chosen.patient_ids == ("003", "001")
    assert chosen.fold_P.tolist() == [2, 0]
    assert of_survival().of(np.array([False, True])).times.tolist() == [30.5]


def test_only_predictions_of_one_task_and_target_are_joined():
    with pytest.raises(ValueError, match="must have one target, got 'grade' and 'stage'"):
        Predictions.joined([of_classes(), of_classes(target="stage")])
    with pytest.raises(ValueError, match="got several of 001, 002, 003"):
        Predictions.joined([of_classes(), of_classes()])
