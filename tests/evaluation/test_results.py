"""An evaluation says what its numbers stand on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from maskattn.evaluation import Predictions
from maskattn.evaluation.calibration import with_temperature
from maskattn.evaluation.results import as_json, evaluate_predictions, with_positive


def graded(counts=(60, 50, 40), seed=0, **more):
    draw = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(counts)), counts)
    logits = draw.normal(size=(len(truth), len(counts))) + 2 * np.eye(len(counts))[truth]
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    task = "binary" if len(counts) == 2 else "ordinal"
    return Predictions(task, "grade", range(len(truth)), scores, truth, range(len(counts)), **more)


def others(predictions, temperature=1.0):
    """The same predictions under other patients' names."""
    scaled = with_temperature(predictions, temperature)
    names = [f"v{name}" for name in predictions.patient_ids]
    return Predictions(scaled.task, "grade", names, scaled.scores_PK, scaled.truth, scaled.classes)


def test_every_metric_has_an_interval_around_it_and_the_json_is_whole():
    one = evaluate_predictions(graded(fold_P=np.arange(150) % 3), "vit")
    assert one.metrics["quadratic_weighted_kappa"].value > 0.5
    for name, found in one.metrics.items():
        assert found.low < found.value < found.high, name
    told = json.loads(json.dumps(as_json([one], []), allow_nan=False))
    assert told["models"]["vit"]["patients"] == 150
    assert [result["patients"] for result in told["models"]["vit"]["by_class"]] == [60, 50, 40]
    assert [result["fold"] for result in told["models"]["vit"]["by_fold"]] == [0, 1, 2]
    assert told["models"]["vit"]["metrics"]["auc"] == {
        "value": one.metrics["auc"].value,
        "low": one.metrics["auc"].low,
        "high": one.metrics["auc"].high,
        "dropped": 0,
        "note": "",
    }


def test_the_seed_decides():
    one = evaluate_predictions(graded())
    assert evaluate_predictions(graded()).metrics == one.metrics
    assert evaluate_predictions(graded(), seed=1).metrics != one.metrics
    assert evaluate_predictions(graded(), stratified=True).metrics != one.metrics


def test_slides_of_a_patient_are_counted_and_drawn_together():
    plain = evaluate_predictions(graded((140, 120)))
    rows = np.repeat(np.arange(260), 3)
    one = graded((140, 120))
    slides = replace(
        one.of(np.arange(260)),
        patient_ids=tuple(f"s{index}" for index in range(len(rows))),
        patient_of=tuple(one.patient_ids[row] for row in rows),
        scores_PK=one.scores_PK[rows],
        truth_P=one.truth[rows],
        predicted_P=one.predicted[rows],
    )
    found = evaluate_predictions(slides)
    for name, value in plain.metrics.items():
        assert (found.metrics[name].low, found.metrics[name].high) == pytest.approx((value.low, value.high)), name
    assert [result.patients for result in found.by_class] == [140, 120]
    assert "Each of 780 slides or patches counts once; intervals are over the 260 patients" in found.notes[0]
    told = as_json([found], [])["models"]["model"]
    assert (told["patients"], told["rows"]) == (260, 780)
    others_slides = replace(slides, patient_ids=tuple(f"v{name}" for name in slides.patient_ids))
    with pytest.raises(ValueError, match="other patients than the test"):
        evaluate_predictions(slides, validation=others_slides)


def test_a_temperature_of_validation_mends_calibration_on_the_test():
    validation = evaluate_predictions(graded(), validation=others(graded(seed=1)))
    sharp = with_temperature(graded(), validation.temperature / 4)
    found = evaluate_predictions(sharp, validation=others(with_temperature(graded(seed=1), validation.temperature / 4)))
    assert found.temperature == pytest.approx(4, rel=0.01)
    assert found.calibrated["ece"].value < 0.5 * found.metrics["ece"].value
    assert found.calibrated["brier"].value < found.metrics["brier"].value


def test_validation_on_test_patients_or_other_classes_is_refused():
    with pytest.raises(ValueError, match="other patients than the test, got 0, 1, 10, 100, 101 and 145 more in both"):
        evaluate_predictions(graded(), validation=graded())
    with pytest.raises(ValueError, match="must have the classes of the test, got 0, 1 and 0, 1, 2"):
        evaluate_predictions(graded(), validation=others(graded((30, 30))))


def test_few_patients_rare_and_absent_classes_and_dropped_resamples_are_noted():
    notes = " ".join(evaluate_predictions(graded((40, 3, 20)).of(np.arange(63))).notes)
    assert "Fewer than 10 patients are of 1 (3)" in notes
    assert "63 patients are few" in notes
    assert "Resamples that lack a class" in notes
    absent = graded()
    assert any("No patient is of 1" in note for note in evaluate_predictions(absent.of(absent.truth != 1)).notes)
    assert evaluate_predictions(graded()).notes == ()


def test_a_fold_without_a_class_has_no_auc_and_stops_nothing():
    fold = np.where(np.arange(150) < 60, 0, np.arange(150) % 2 + 1)
    first, second, _ = evaluate_predictions(graded(fold_P=fold)).by_fold
    assert first.metrics["auc"] is None
    assert first.metrics["accuracy"] is not None
    assert second.metrics["auc"] is None


def test_the_positive_class_is_the_second_and_may_be_named():
    predictions = graded((60, 40))
    turned = with_positive(predictions, "0")
    assert turned.classes == ("1", "0")
    one, other = evaluate_predictions(predictions), evaluate_predictions(turned)
    assert other.metrics["auc"].value == pytest.approx(one.metrics["auc"].value)
    assert other.metrics["f1"].value == pytest.approx(one.by_class[0].metrics["f1"].value)
    assert with_positive(predictions, "1") is predictions
    with pytest.raises(ValueError, match="one of two, got 'x' of 0, 1"):
        with_positive(predictions, "x")


def test_too_few_resamples_are_refused():
    with pytest.raises(ValueError, match="100 resamples or more, got 10"):
        evaluate_predictions(graded(), resamples=10)


@pytest.mark.parametrize("sharper", [1.0, 30.0])
def test_folds_whose_scores_differ_in_scale_are_noted(sharper):
    plain = graded((100, 100), fold_P=np.arange(200) % 2)
    odd_P = plain.fold_P == 1
    # The second fold's scores lie lower: no patient of the fold changes places with another of it.
    second_P = np.where(odd_P, plain.scores_PK[:, 1] ** sharper, plain.scores_PK[:, 1])
    apart = replace(plain, scores_PK=np.stack([1 - second_P, second_P], axis=1))
    one = evaluate_predictions(apart, resamples=100)
    mean = np.mean([result.metrics["auc"] for result in one.by_fold])
    assert mean == pytest.approx(np.mean([result.metrics["auc"] for result in evaluate_predictions(plain).by_fold]))
    found = [note for note in one.notes if "differ in scale" in note]
    assert len(found) == (sharper > 1)
    assert all(f"{one.metrics['auc'].value:.3f}" in note and f"{mean:.3f}" in note for note in found)
