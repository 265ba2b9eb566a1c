"""Train a slide model on a cohort, and predict patients with a trained model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.evaluation.calibration import fit_temperature, with_temperature
from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.splits import Split, check_classes, inner_split, strata_of
from maskattn.nn.slide_models.card import CONFIG, EncoderFacts, ModelCard, mismatches, read_card
from maskattn.nn.slide_models.folder import load_model_folder, save_model
from maskattn.nn.slide_models.head import SlideHead
from maskattn.training.bags import CaseDataset, Draw, Sampling
from maskattn.training.batches import CaseBatches, InOrder
from maskattn.training.checkpoints import read_state
from maskattn.training.cohort import Case, Cohort
from maskattn.training.feature_facts import FeatureFacts, facts_of_cohort, look_through
from maskattn.training.loop import FitResult, Progress, fit, loader_of
from maskattn.training.models import build_head, in_units_of
from maskattn.training.processes import check_counts
from maskattn.training.run_config import RUN_CONFIG, read_config, settings_from
from maskattn.training.run_folder import check_run, full_disk_in_words, note_data, place_of_process
from maskattn.training.settings import TrainSettings
from maskattn.training.slide_module import SlideTraining, outputs_of_case, predictions_of
from maskattn.training.tasks import ClassTask, SurvivalTask, TrainedTask, ValueTask, task_of

__all__ = ["PREDICTIONS", "TrainedRun", "predict", "train_model", "validation_split"]

PREDICTIONS = "patient-preds.csv"
_BATCH_SIZE, _SURVIVAL_BATCH_SIZE = 8, 32


@dataclass(frozen=True)
class TrainedRun:
    """A trained model.

    Attributes:
        folder: the model folder, which ``maskattn infer --model`` takes.
        best_epoch: index of the epoch whose weights it has.
        rows: the rows of the log, one per epoch.
        validation: its predictions of the validation cases, with the temperature applied.
        temperature: the temperature that was fitted on them.
        went_on: whether the training was resumed from an earlier run.
    """

    folder: Path
    best_epoch: int
    rows: list[dict[str, float]]
    validation: Predictions
    temperature: float
    went_on: bool


def validation_split(cohort: Cohort, share: float, seed: int) -> Split:
    """Split the cohort's patients into a training and a validation part, stratified by the target.

    Args:
        cohort: the cohort.
        share: share of the patients for validation.
        seed: seed of the split.

    Raises:
        ValueError: there are too few patients.
    """
    strata = strata_of(cohort.task, cohort.strata, max(2, round(1 / share)))
    return Split(*inner_split(cohort.patients, strata, share, seed))


def train_model(
    settings: TrainSettings,
    cohort: Cohort,
    split: Split,
    out: Path,
    *,
    progress: Progress | None = None,
) -> TrainedRun:
    """Train a slide model; an interrupted run is resumed, and a finished one is only read.

    Args:
        settings: the settings of the training.
        cohort: the cases, as :func:`maskattn.training.cohort.cohort_of` reads them.
        split: the patients for training and for validation; its test part is not used.
        out: folder of the run and the model.
        progress: receives the progress of the training.

    Raises:
        SlideError: features cannot be used, or are of several encoders.
        ValueError: a part lacks a class, there are too few cases, or ``out`` has a run of another configuration.
        OutputError: the run cannot be written; earlier files are kept.
        GroupError: one of the processes that train together has ended.
    """
    rank, processes = place_of_process(settings)
    if cohort.task == "survival" and processes > 1:
        raise ValueError(
            f"a survival task compares all patients of a batch and trains in one process, got --devices {processes}; "
            "leave it out"
        )
    check_run(out, settings)
    training, validation = cohort.of(split.train), cohort.of(split.validation)
    check_counts(settings, len(validation))
    if cohort.classes or cohort.task == "survival":
        check_classes([replace(split, test=())], {case.patient_id: case.truth[-1] for case in training + validation})
    files = {slide: path for case in training + validation for slide, path in case.slides.items()}
    found = look_through(files, settings.encoder, None if progress is None else progress.looked_through)
    facts = facts_of_cohort(found, settings.encoder, settings.token_mask)
    data = Data(cohort, training, validation, facts)
    with full_disk_in_words(out):
        if rank == 0:
            note_data(out, settings, _digest(training, validation, found))
        ended = _ended(out, cohort)
        if ended is not None:
            return ended
        module, result = _fitted(settings, data, out, progress, rank, processes)
        if rank:
            raise SystemExit(0)  # only the first process writes the results
        return _finished(settings, data, out, module, result)


@dataclass(frozen=True)
class Data:
    """The data of a training: the cases of both splits, and the metadata that their features share."""

    cohort: Cohort
    training: Sequence[Case]
    validation: Sequence[Case]
    facts: FeatureFacts


def _fitted(
    settings: TrainSettings, data: Data, out: Path, progress: Progress | None, rank: int, processes: int
) -> tuple[SlideTraining, FitResult]:
    cohort, training, validation = data.cohort, data.training, data.validation
    num_classes = len(cohort.classes) or 1
    task = task_of(cohort.task, num_classes, training, settings.class_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = build_head(settings, data.facts.width, num_classes)
    sampling = Sampling(settings.seed, settings.tiles_per_slide, settings.drop_tokens)
    how = (settings.fusion, head.reads_grid, settings.encoder)
    batch_size, events = settings.batch_size or _BATCH_SIZE, None
    if cohort.task == "survival":
        # The risk sets of a step are over all its cases, so its batches are joined.
        batch_size = (settings.batch_size or _SURVIVAL_BATCH_SIZE) * settings.accumulate
        settings, events = replace(settings, accumulate=1), [case.truth[1] > 0 for case in training]
    batches = CaseBatches(len(training), batch_size * processes, settings.seed, events, rank, processes)
    module = SlideTraining(head, task, settings, cohort, validation)
    result = fit(
        module,
        loader_of(CaseDataset(training, *how, sampling), settings, batch_sampler=batches),
        loader_of(CaseDataset(validation, *how), settings, sampler=InOrder(len(validation), rank, processes)),
        folder=out,
        metric=module.metric,
        progress=progress,
    )
    return module, result


def _ended(out: Path, cohort: Cohort) -> TrainedRun | None:
    """Read the finished run of a folder; None if there is none."""
    state = read_state(out / "state" / "last.ckpt") if (out / CONFIG).is_file() else None
    if state is None or not state["maskattn"]["finished"] or not (out / PREDICTIONS).is_file():
        return None
    predictions = Predictions.read_csv(out / PREDICTIONS, cohort.task, cohort.target)
    own = state["maskattn"]
    return TrainedRun(out, own["best_epoch"], own["rows"], predictions, read_card(out).temperature, True)


def _finished(settings: TrainSettings, data: Data, out: Path, module: SlideTraining, result: FitResult) -> TrainedRun:
    """Fit the temperature, and write the model and its predictions of the validation cases."""
    cohort, task, head = data.cohort, module.task, module.network().cpu().eval()
    outputs_PK = _outputs(head, task, CaseDataset(data.validation, settings.fusion, head.reads_grid, settings.encoder))
    predictions, temperature = predictions_of(outputs_PK, data.validation, cohort, task), 1.0
    if cohort.classes:
        temperature = fit_temperature(predictions)
        predictions = with_temperature(predictions, temperature)
    if isinstance(task, ValueTask):
        in_units_of(head, task)
    best = result.rows[result.best_epoch]
    not_metrics = ("name", "epoch", "step", "lr", "seconds")
    card = ModelCard(
        name=out.resolve().name,
        kind=head.kind,
        classes=cohort.classes or ((cohort.target,) if cohort.task == "regression" else ("log_risk",)),
        encoder=None if data.facts.encoder is None else EncoderFacts(data.facts.encoder, data.facts.width),
        patch_px=data.facts.patch_px,
        spacing_um=data.facts.spacing_um,
        token_mask=data.facts.token_mask,
        trained_on=f"{len(data.training)} cases for training and {len(data.validation)} for validation, "
        f"{data.facts.tiles:,} tiles in all, with the labels of {cohort.target}",
        metrics={name: value for name, value in best.items() if name not in not_metrics},
        facts={"model": settings.model, "epoch": str(result.best_epoch), "slides of a patient": settings.fusion},
        task=cohort.task,
        target=cohort.target,
        temperature=temperature,
    )
    predictions.write_csv(out / PREDICTIONS)
    save_model(out, head, card)
    return TrainedRun(out, result.best_epoch, result.rows, predictions, temperature, result.went_on)


def predict(folder: Path, cohort: Cohort, patients: Sequence[str] | None = None) -> Predictions:
    """Predict patients with a trained model.

    Args:
        folder: the model folder that :func:`train_model` wrote.
        cohort: the cohort with the patients' features and labels; its classes must be the model's.
        patients: ids of the patients; None predicts all of the cohort.

    Raises:
        SlideError: features do not match those of the training; the error names the differences.
        ValueError: the cohort has another task or other classes.
    """
    settings = settings_from(TrainSettings, read_config(folder / RUN_CONFIG, TrainSettings))
    head, card = load_model_folder(folder, settings.impl)
    assert isinstance(head, SlideHead), "a training makes heads"
    if (card.task, card.classes if cohort.classes else ()) != (cohort.task, cohort.classes):
        raise ValueError(
            f"a model predicts only what it was trained for, {card.task} of {', '.join(card.classes)}, got "
            f"{cohort.task} of {', '.join(cohort.classes) or cohort.target}; name the classes in the model's order"
        )
    cases = list(cohort.cases) if patients is None else cohort.of(patients)
    files = {slide: path for case in cases for slide, path in case.slides.items()}
    _check_features(card, head.in_dim, look_through(files, settings.encoder))
    task: TrainedTask = ClassTask(len(cohort.classes)) if cohort.classes else SurvivalTask()
    task = ValueTask(0.0, 1.0) if cohort.task == "regression" else task
    outputs_PK = _outputs(head, task, CaseDataset(cases, settings.fusion, head.reads_grid, settings.encoder))
    predictions = predictions_of(outputs_PK, cases, cohort, task)
    return with_temperature(predictions, card.temperature) if cohort.classes else predictions


@torch.no_grad()
def _outputs(head: SlideHead, task: TrainedTask, dataset: CaseDataset) -> Tensor:
    return torch.stack([outputs_of_case(head, task, dataset[Draw(index, 0)]).float() for index in range(len(dataset))])


def _check_features(card: ModelCard, width: int, found: Mapping[str, FeatureFacts]) -> None:
    for slide_id, facts in found.items():
        wrong = mismatches(card, facts.card())
        if facts.width != width and not any("width" in one for one in wrong):
            wrong.append(f"width of features {facts.width} instead of {width}")
        if wrong:
            raise SlideError(
                f"a slide model must be run with what it was trained with, got {'; '.join(wrong)} for {slide_id!r} and "
                f"{card.name}; give features of its encoder"
            )


def _digest(training: Sequence[Case], validation: Sequence[Case], found: Mapping[str, FeatureFacts]) -> str:
    """Return the SHA-256 of a run's data: the cases of both parts, their truth, and their numbers of tiles."""
    contents = [
        [
            (
                case.case_id,
                case.patient_id,
                case.truth,
                {slide: (found[slide].tiles, found[slide].width) for slide in case.slides},
            )
            for case in part
        ]
        for part in (training, validation)
    ]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
