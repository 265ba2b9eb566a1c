"""``maskattn crossval``: trains a model for each fold, and reports predictions for patients not seen in training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskattn.cli.options import ConfigFile, Debug, takes_settings
from maskattn.cli.reporting import errors_in_one_line, say
from maskattn.cli.train import cohort_in, given_settings, patients_by_id
from maskattn.training.settings import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from maskattn.evaluation.crossval import FoldOutcome
    from maskattn.evaluation.predictions import Predictions
    from maskattn.evaluation.splits import Split
    from maskattn.training.cohort import Cohort

__all__ = ["crossval"]


@takes_settings
def crossval(
    context: typer.Context,
    *,
    config: ConfigFile = None,
    folds: Annotated[
        int, typer.Option("--folds", help="Number of folds, unless --split has them.", min=2, show_default=True)
    ] = 5,
    candidate: Annotated[
        list[Path] | None,
        typer.Option(
            "--candidate",
            help="YAML of differing settings (may be repeated); each fold chooses one on its validation part.",
        ),
    ] = None,
    resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap resamples of patients.", min=100)] = 1000,
    settings: TrainSettings,
    debug: Debug = False,
) -> None:
    """Cross-validate a slide model: train, predict and report.

    Folds are grouped by patient and stratified. To resume an interrupted run, repeat the same command.
    """
    with errors_in_one_line(debug, "finished folds and epochs"):
        settings = given_settings(context, settings, config)
        if settings.out is None:
            raise ValueError("a cross-validation must have an output folder, got no --out; name one")

        from maskattn.training.candidates import read_candidates

        candidates = read_candidates(settings, candidate or ())
        cohort = cohort_in(settings)
        splits = _splits_of(settings, cohort, folds)

        from maskattn.evaluation.crossval import cross_validate, pooled
        from maskattn.evaluation.inputs import PREDICTIONS_CSV
        from maskattn.evaluation.report import value_text, write_evaluation
        from maskattn.evaluation.results import evaluate_predictions

        trainer = _Training(candidates, cohort)
        outcomes = cross_validate(trainer, list(candidates), splits, settings.out, partial(_report_fold, settings))
        predictions, notes = pooled(outcomes)
        predictions.write_csv(settings.out / PREDICTIONS_CSV)
        found = evaluate_predictions(
            predictions,
            settings.out.resolve().name,
            resamples=resamples,
            seed=settings.seed,
            folds=[outcome.predictions for outcome in outcomes],
            notes=(*notes, *_chosen(outcomes)),
        )
        report = write_evaluation(settings.out, [found], title=f"Cross-validation: {cohort.target}")
    for name, value in found.metrics.items():
        say(f"{name:<26} {value_text(value)}")
    for note in found.notes:
        say(f"note: {note}")
    say(f"report: {report}")


class _Training:
    """Trains the candidates, and predicts with the trained models."""

    def __init__(self, candidates: Mapping[str, TrainSettings], cohort: Cohort) -> None:
        self._candidates, self._cohort = candidates, cohort

    def train(self, candidate: str, split: Split, folder: Path) -> Predictions:
        from maskattn.cli.training_progress import TrainingProgress, tell_once
        from maskattn.training.train import train_model

        settings = self._candidates[candidate]
        tell_once(settings, f"training {folder}")
        with TrainingProgress(settings) as progress:
            return train_model(settings, self._cohort, split, folder, progress=progress).validation

    def predict(self, folder: Path, patients: Sequence[str]) -> Predictions:
        from maskattn.training.train import predict

        return predict(folder, self._cohort, patients)


def _splits_of(settings: TrainSettings, cohort: Cohort, folds: int) -> list[Split]:
    """Return the folds, read from a table or drawn; every part must have every class."""
    from maskattn.cli.training_progress import tell_once
    from maskattn.evaluation.split_files import read_splits
    from maskattn.evaluation.splits import check_classes, grouped_folds, strata_of

    if settings.split is not None:
        splits = read_splits(settings.split, patients_by_id(cohort))
    else:
        strata = strata_of(cohort.task, cohort.strata, folds)
        splits = grouped_folds(cohort.patients, strata, folds, settings.seed, settings.validation_share)
    if cohort.task != "regression":
        label_of = {case.patient_id: case.truth[-1] for case in cohort.cases}
        names = cohort.classes or ("no event", "the event")
        for note in check_classes(splits, {patient: names[int(label)] for patient, label in label_of.items()}):
            tell_once(settings, f"{note}; metrics of that fold which need it are left out")
    return splits


def _report_fold(settings: TrainSettings, outcome: FoldOutcome) -> None:
    from maskattn.cli.training_progress import tell_once
    from maskattn.evaluation.metrics import metrics_of

    title = metrics_of(outcome.predictions.task)[0].title
    values = [
        f"{value:.3f}" if len(outcome.validation) == 1 else f"{name} {value:.3f}"
        for name, value in outcome.validation.items()
        if value is not None
    ]
    chosen = "" if len(outcome.validation) == 1 else f"; {outcome.chosen} is chosen"
    tell_once(
        settings, f"fold {outcome.fold}: {title} on its validation part: {', '.join(values) or 'not defined'}{chosen}"
    )


def _chosen(outcomes: list[FoldOutcome]) -> tuple[str, ...]:
    """Return a note on each fold's chosen candidate, if there were several."""
    if len(outcomes[0].validation) == 1:
        return ()
    chosen = ", ".join(f"{outcome.fold} {outcome.chosen}" for outcome in outcomes)
    return (f"Each fold's model was chosen on its validation part: fold {chosen}.",)
