"""``maskattn train``: features of tiles and a table of labels to a slide model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from maskattn.cli.options import ConfigFile, Debug, takes_settings
from maskattn.cli.reporting import errors_in_one_line, say, tell
from maskattn.errors import quoted
from maskattn.training.settings import TrainSettings

if TYPE_CHECKING:
    from maskattn.evaluation.splits import Split
    from maskattn.training.cohort import Cohort

__all__ = ["cohort_in", "given_settings", "patients_by_id", "train"]


@takes_settings
def train(
    context: typer.Context,
    *,
    config: ConfigFile = None,
    settings: TrainSettings,
    debug: Debug = False,
) -> None:
    """Train a slide model, or with --stage tile an encoder of tiles.

    It learns from features of slides' tiles and a table of labels, an encoder from labelled patches. A run that was
    killed goes on with the same command. OUT becomes a model: maskattn infer --model OUT.
    """
    with errors_in_one_line(debug, "finished epochs"):
        settings = given_settings(context, settings, config)
        if settings.out is None:
            raise ValueError("a training must have a folder to write, got no --out; name one")

        from maskattn.cli.training_progress import TrainingProgress

        if settings.stage == "tile":
            cohort = _patches_in(settings, settings.out)
            from maskattn.training.train_tiles import train_tiles as trained
        else:
            cohort = cohort_in(settings)
            from maskattn.training.train import train_model as trained
        split = _split_of(settings, cohort)
        with TrainingProgress(settings.epochs) as progress:
            run = trained(settings, cohort, split, settings.out, progress=progress)
    best = run.rows[run.best_epoch]
    found = ", ".join(f"{name[11:]} {value:.4g}" for name, value in best.items() if name.startswith("validation_"))
    say(f"best epoch {run.best_epoch + 1} of {len(run.rows)}: {found} on {run.validation.patients} validation cases")
    if settings.stage == "tile":
        say(f"encoder: --encoder {settings.encoder} --weights {quoted(run.folder / 'encoder.safetensors')}")
        return
    say(
        f"model: {run.folder}; predict with `maskattn infer --model {quoted(run.folder)} --features FEATURES --out OUT`"
    )


def given_settings(context: typer.Context, settings: TrainSettings, config: Path | None) -> TrainSettings:
    """The settings of a command: its flags before what the file says, and that before the defaults.

    Raises:
        ValueError: a key of the file is unknown, or a value does not fit its field.
    """
    from dataclasses import fields

    from maskattn.training.run_config import read_config, settings_from

    values: dict[str, Any] = {} if config is None else read_config(config, TrainSettings)
    for one in fields(TrainSettings):
        source = context.get_parameter_source(one.name)
        if source is not None and source.name == "COMMANDLINE":
            values[one.name] = getattr(settings, one.name)
    return settings_from(TrainSettings, values)


def cohort_in(settings: TrainSettings) -> Cohort:
    """The cohort of a run, whose folder is made and lists the slides that are left out.

    Raises:
        ValueError: as :func:`maskattn.training.cohort.cohort_of`; what slides lack is listed, too.
    """
    from maskattn.slide.output_folder import prepare_output
    from maskattn.training.cohort import IncompleteCohortError, cohort_of
    from maskattn.training.left_out import write_left_out

    assert settings.out is not None
    if settings.stage == "tile" or settings.patches is not None:
        raise ValueError(
            "a slide model reads --features, got --stage tile or --patches; leave them out, or fine-tune an encoder on "
            "patches with maskattn train --stage tile"
        )
    try:
        cohort = cohort_of(settings, tell)
    except IncompleteCohortError as error:
        prepare_output(settings.out)
        listed = write_left_out(settings.out, error.left_out)
        raise ValueError(f"{error}; all of them stand in {listed}") from error
    prepare_output(settings.out)
    if cohort.left_out:
        write_left_out(settings.out, cohort.left_out)
    return cohort


def _patches_in(settings: TrainSettings, out: Path) -> Cohort:
    """The labelled patches of a run, whose folder is made.

    Raises:
        ValueError: something is asked for that is of slide models, or there are no patches of two classes.
    """
    from maskattn.slide.output_folder import prepare_output
    from maskattn.training.patches import find_patches

    given = [name for name in ("features", "labels", "slide_table", "time", "event") if getattr(settings, name)]
    if given:
        raise ValueError(f"--stage tile reads --patches, got {', '.join(given)} beside it; leave them out")
    cohort = find_patches(settings)
    prepare_output(out)
    return cohort


def patients_by_id(cohort: Cohort) -> dict[str, str]:
    """Patient of every slide and of every patient: a table of splits may name either."""
    patient_of = {case.patient_id: case.patient_id for case in cohort.cases}
    return patient_of | {slide: case.patient_id for case in cohort.cases for slide in case.slides}


def _split_of(settings: TrainSettings, cohort: Cohort) -> Split:
    """The parts of the patients: from a table, or drawn."""
    if settings.split is None:
        from maskattn.training.train import validation_split

        return validation_split(cohort, settings.validation_share, settings.seed)
    from maskattn.evaluation.split_files import read_splits

    splits = read_splits(settings.split, patients_by_id(cohort))
    if len(splits) != 1:
        raise ValueError(
            f"a training has one split, got {len(splits)} folds in {settings.split}; name the file of one, or train "
            "all with maskattn crossval"
        )
    return splits[0]
