"""Runs of a training: what they leave, what they refuse, and that inference reads them."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_lightning")
pytest.importorskip("sksurv")

from small_cohorts import WIDTH, read_table, write_cohort, write_slide

from maskattn.errors import OutputError, SlideError
from maskattn.nn.slide_models.card import read_card
from maskattn.nn.slide_models.folder import load_two_stages
from maskattn.slide.layouts import list_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import read_prediction
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.training.cohort import cohort_of
from maskattn.training.module import TrainingDivergedError
from maskattn.training.settings import TrainSettings
from maskattn.training.train import TrainedRun, predict, train_model, validation_split


@pytest.fixture(scope="module")
def cohort_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), patients=18, classes=3, tiles=12)


def settings_of(files: tuple[Path, Path], **changed: Any) -> TrainSettings:
    given = {"target": "grade", "task": "ordinal", "model": "abmil", "width": 16, "epochs": 2, "lr": 1e-2}
    return TrainSettings(features=files[0], labels=files[1], device="cpu", **{**given, **changed})


def train(settings: TrainSettings, out: Path, share: float = 0.3, **more: Any) -> TrainedRun:
    cohort = cohort_of(settings)
    return train_model(settings, cohort, validation_split(cohort, share, settings.seed), out, **more)


@pytest.fixture(scope="module")
def ordinal_run(cohort_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(settings_of(cohort_files, epochs=6), tmp_path_factory.mktemp("runs") / "ordinal")


def test_a_run_leaves_a_model_its_predictions_its_log_and_its_configuration(ordinal_run: TrainedRun) -> None:
    folder = ordinal_run.folder
    assert {"config.json", "model.safetensors", "README.md", "patient-preds.csv", "log.csv", "run.yaml"} <= set(
        os.listdir(folder)
    )
    rows = read_table(folder / "log.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    card = read_card(folder)
    assert (card.task, card.target, card.classes) == ("ordinal", "grade", ("0", "1", "2"))
    assert card.temperature == ordinal_run.temperature != 1
    assert card.encoder is not None
    assert (card.encoder.name, card.encoder.width, card.spacing_um, card.token_mask) == ("uni", WIDTH, 0.5, "none")


def test_infer_says_of_a_slide_what_the_training_said(
    ordinal_run: TrainedRun, cohort_files: tuple[Path, Path], tmp_path: Path
) -> None:
    said = ordinal_run.validation
    slide_id = f"s{said.patient_ids[0][1:]}a"
    model = load_two_stages(ordinal_run.folder)
    settings = RunSettings(tmp_path / "out", features_dir=cohort_files[0])
    run_slides([SlideJob(slide_id, list_features(cohort_files[0])[slide_id])], model, settings)
    scores = read_prediction(tmp_path / "out" / slide_id / "prediction.json").scores
    assert list(scores.values()) == pytest.approx(said.scores_PK[0], abs=1e-5)


def test_infer_gives_the_value_of_a_regression(cohort_files: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(settings_of(cohort_files, task="regression", target="value", model="mean", epochs=3), tmp_path / "run")
    slide_id = f"s{run.validation.patient_ids[0][1:]}a"
    settings = RunSettings(tmp_path / "out", features_dir=cohort_files[0])
    job = SlideJob(slide_id, list_features(cohort_files[0])[slide_id])
    run_slides([job], load_two_stages(run.folder), settings)
    scores = read_prediction(tmp_path / "out" / slide_id / "prediction.json").scores
    assert list(scores) == ["value"]
    assert scores["value"] == pytest.approx(run.validation.scores_PK[0, 0], rel=1e-5)
    assert 3 < scores["value"] < 12  # in the labels' units


def test_a_trained_model_predicts_other_patients_and_refuses_other_encoders(
    ordinal_run: TrainedRun, cohort_files: tuple[Path, Path], tmp_path: Path
) -> None:
    cohort = cohort_of(settings_of(cohort_files))
    again = predict(ordinal_run.folder, cohort, ordinal_run.validation.patient_ids)
    assert again.scores_PK == pytest.approx(ordinal_run.validation.scores_PK, abs=1e-6)
    files = write_cohort(tmp_path, patients=6, classes=3, tiles=8)
    for slide_id in list_features(files[0]):
        write_slide(files[0], slide_id, np.ones((8, WIDTH), np.float32), encoder="virchow2")
    for path in files[0].glob("*/features_uni/*"):
        path.unlink()
    with pytest.raises(SlideError, match="got encoder virchow2 instead of uni"):
        predict(ordinal_run.folder, cohort_of(settings_of(files)))


def test_a_run_that_has_ended_is_read_and_another_configuration_is_refused(
    ordinal_run: TrainedRun, cohort_files: tuple[Path, Path]
) -> None:
    before = (ordinal_run.folder / "model.safetensors").stat().st_mtime_ns
    again = train(settings_of(cohort_files, epochs=6, workers=0), ordinal_run.folder)
    assert again.went_on
    assert again.validation.scores_PK == pytest.approx(ordinal_run.validation.scores_PK)
    assert (ordinal_run.folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"got epochs 6 instead of 7; lr 0\.01 instead of 0\.1 in .*name another --out"
    ):
        train(settings_of(cohort_files, epochs=7, lr=0.1), ordinal_run.folder)
    with pytest.raises(ValueError, match="is resumed with its own data"):
        train(settings_of(cohort_files, epochs=6), ordinal_run.folder, share=0.5)


def test_accumulated_batches_learn_what_one_large_batch_learns(cohort_files: tuple[Path, Path], tmp_path: Path) -> None:
    given = {"task": "multiclass", "dropout": 0.0, "class_weights": "balanced", "epochs": 2}
    runs = [
        train(settings_of(cohort_files, batch_size=size, accumulate=many, **given), tmp_path / f"{size}")
        for size, many in ((6, 1), (2, 3))
    ]
    assert runs[0].validation.scores_PK == pytest.approx(runs[1].validation.scores_PK, abs=2e-4)


@pytest.mark.parametrize("fusion", ["early", "late", "none"])
def test_several_slides_of_a_patient(fusion: str, tmp_path: Path) -> None:
    files = write_cohort(tmp_path, patients=8, classes=2, slides_each=2, tiles=8)
    run = train(
        settings_of(files, task="binary", model="vit", fusion=fusion, positions="rotary", heads=1, epochs=1),
        tmp_path / "run",
        share=0.5,
    )
    cases = 4 * (2 if fusion == "none" else 1)
    assert run.validation.rows == cases
    assert run.validation.patients == 4
    patients = {row["patient_id"] for row in read_table(files[1])}
    assert (set(run.validation.patient_ids) <= patients) == (fusion != "none")
    assert set(run.validation.owners) <= patients


def test_a_survival_model_is_trained_with_censored_patients(cohort_files: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(
        settings_of(cohort_files, task="survival", target=None, time="months", event="death", model="max", epochs=3),
        tmp_path / "run",
    )
    assert run.validation.task == "survival"
    assert "validation_c_index" in run.rows[0]
    assert read_card(run.folder).classes == ("log_risk",)


def test_mixed_precision_trains_and_keeps_weights_in_single_precision(
    cohort_files: tuple[Path, Path], tmp_path: Path
) -> None:
    run = train(settings_of(cohort_files, model="vit", precision="bf16", epochs=1), tmp_path / "run")
    assert {x.dtype for x in load_two_stages(run.folder).state_dict().values() if x.is_floating_point()} == {
        torch.float32
    }
    with pytest.raises(ValueError, match="needs a GPU"):
        train(settings_of(cohort_files, precision="16"), tmp_path / "half")


def test_training_stops_where_nothing_improves(cohort_files: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(settings_of(cohort_files, lr=1e-9, patience=2, epochs=30, monitor="metric"), tmp_path / "run")
    assert len(run.rows) == 3
    assert run.best_epoch == 0


def test_a_loss_that_is_no_number_is_said_at_once(cohort_files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="take a lower --lr"):
        train(settings_of(cohort_files, task="regression", target="value", lr=1e30, clip=0, epochs=4), tmp_path / "run")


def test_a_full_disk_keeps_the_epoch_before_and_the_same_command_goes_on(
    cohort_files: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = settings_of(cohort_files, width=64, epochs=4, dropout=0.2)

    class Filling:
        """Lets no file grow beyond some bytes from the second epoch on."""

        def looked_through(self, slide_id: str, done: int, slides: int) -> None: ...

        def batch_done(self, epoch: int, done: int, batches: int) -> None: ...

        def epoch_done(self, row: dict[str, float], best: bool) -> None:
            if row["epoch"] == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OutputError, match=r"the state of the previous epoch is kept: free space, and run the same"):
            train(settings, tmp_path / "run", progress=Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert len(read_table(tmp_path / "run" / "log.csv")) == 2
    assert not list((tmp_path / "run").rglob("*.partial"))
    went_on, whole = train(settings, tmp_path / "run"), train(settings, tmp_path / "whole")
    assert went_on.went_on
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert went_on.validation.scores_PK == pytest.approx(whole.validation.scores_PK)


def test_torchs_own_generator_is_left_as_it_was(cohort_files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(replace(settings_of(cohort_files), epochs=1), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)
