"""``maskattn train``: trains a slide model on features of tiles and a table of labels, or a tile encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from maskattn.cli.options import ConfigFile, Debug, takes_settings
from maskattn.cli.reporting import errors_in_one_line, say
from maskattn.errors import quoted
from maskattn.training.settings import TrainSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from maskattn.evaluation.splits import Split
    from maskattn.training.cohort import Cohort
    from maskattn.training.slide_tiles import LaidSlides

__all__ = ["cohort_in", "given_settings", "patients_by_id", "train"]

_OF_SLIDES_ALONE = ("spacing_um", "patch_px", "validation_tiles")


@takes_settings
def train(
    context: typer.Context,
    *,
    config: ConfigFile = None,
    settings: TrainSettings,
    debug: Debug = False,
) -> None:
    """Train a slide model, or with --stage tile a tile encoder.

    A slide model learns from features of tiles and a table of labels, an encoder from labelled patches or slides. To
    resume an interrupted run, repeat the same command. OUT becomes a model: maskattn infer --model OUT.
    """
    with errors_in_one_line(debug, "finished epochs"):
        settings = given_settings(context, settings, config)
        if settings.out is None:
            raise ValueError("a training must have an output folder, got no --out; name one")

        from maskattn.cli.training_progress import TrainingProgress

        laid = None
        if settings.stage == "slide":
            cohort = cohort_in(settings)
        elif settings.slides is None:
            cohort = _patches_in(settings, settings.out)
        else:
            cohort, laid = _slides_in(settings, settings.out)
        split = _split_of(settings, cohort)
        with TrainingProgress(settings) as progress:
            if settings.stage == "slide":
                from maskattn.training.train import train_model

                run = train_model(settings, cohort, split, settings.out, progress=progress)
            else:
                from maskattn.training.train_tiles import train_tiles

                run = train_tiles(settings, cohort, split, settings.out, laid=laid, progress=progress)
    best = run.rows[run.best_epoch]
    found = ", ".join(f"{name[11:]} {value:.4g}" for name, value in best.items() if name.startswith("validation_"))
    say(f"best epoch {run.best_epoch + 1} of {len(run.rows)}: {found} on {run.validation.rows} validation cases")
    if settings.stage == "tile":
        say(f"encoder: --encoder {settings.encoder} --weights {quoted(run.folder / 'encoder.safetensors')}")
        return
    say(
        f"model: {run.folder}; predict with `maskattn infer --model {quoted(run.folder)} --features FEATURES --out OUT`"
    )


def given_settings(context: typer.Context, settings: TrainSettings, config: Path | None) -> TrainSettings:
    """Return the settings of a command: its flags override the file, and the file overrides the defaults.

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
    """Read the cohort of a run; create the run's folder, with a list of the slides that are left out.

    Raises:
        ValueError: see :func:`maskattn.training.cohort.cohort_of`; slides that lack something are listed in a file.
    """
    from maskattn.cli.training_progress import tell_once
    from maskattn.slide.output_folder import prepare_output
    from maskattn.training.cohort import IncompleteCohortError, cohort_of
    from maskattn.training.left_out import write_left_out

    assert settings.out is not None
    if settings.stage == "tile" or settings.patches is not None:
        raise ValueError(
            "a slide model reads --features, got --stage tile or --patches; leave them out, or fine-tune an encoder on "
            "patches with maskattn train --stage tile"
        )
    _refuse(settings, ("slides", *_OF_SLIDES_ALONE), "a slide model reads --features")
    try:
        cohort = cohort_of(settings, partial(tell_once, settings))
    except IncompleteCohortError as error:
        prepare_output(settings.out)
        listed = write_left_out(settings.out, error.left_out)
        raise ValueError(f"{error}; all of them are listed in {listed}") from error
    prepare_output(settings.out)
    if cohort.left_out:
        write_left_out(settings.out, cohort.left_out)
    return cohort


def _patches_in(settings: TrainSettings, out: Path) -> Cohort:
    """Read the labelled patches of a run; create the run's folder.

    Raises:
        ValueError: an option of slide models is given, or there are no patches of two classes.
    """
    from maskattn.slide.output_folder import prepare_output
    from maskattn.training.patches import find_patches

    foreign = ("features", "labels", "slide_table", "time", "event", "tiles_per_slide", *_OF_SLIDES_ALONE)
    _refuse(settings, foreign, "--stage tile reads --patches")
    cohort = find_patches(settings)
    prepare_output(out)
    return cohort


def _slides_in(settings: TrainSettings, out: Path) -> tuple[Cohort, LaidSlides]:
    """Read the labelled slides of a run and their tiles; create the run's folder, with a list of the left-out slides.

    Raises:
        ValueError: see :mod:`maskattn.training.weak_labels`; slides that lack something are listed in a file.
    """
    from maskattn.cli.training_progress import TrainingProgress, tell_once
    from maskattn.evaluation.predictions import some_of
    from maskattn.slide.output_folder import prepare_output
    from maskattn.training.cohort import IncompleteCohortError
    from maskattn.training.left_out import write_left_out
    from maskattn.training.run_folder import check_run
    from maskattn.training.weak_labels import labelled_slides, with_tiles

    foreign = ("features", "patches", "patient_pattern", "time", "event")
    _refuse(settings, foreign, "--stage tile reads --slides and their --labels")
    check_run(out, settings)
    try:
        cohort, jobs = labelled_slides(settings, partial(tell_once, settings))
    except IncompleteCohortError as error:
        prepare_output(out)
        listed = write_left_out(out, error.left_out)
        raise ValueError(f"{error}; all of them are listed in {listed}") from error
    with TrainingProgress(settings) as progress:
        cohort, laid = with_tiles(cohort, jobs, settings, progress.looked_through)
    prepare_output(out)
    if cohort.left_out:
        listed = write_left_out(out, cohort.left_out)
        if laid.unusable:
            tell_once(
                settings,
                f"{len(laid.unusable)} slides cannot be used and are left out ({some_of(list(laid.unusable))}); "
                f"{listed} gives the reasons",
            )
    return cohort, laid


def _refuse(settings: TrainSettings, names: Sequence[str], rule: str) -> None:
    """Refuse options that would have no effect."""
    given = [name for name in names if getattr(settings, name) is not None]
    if given:
        raise ValueError(f"{rule}, got {', '.join(given)} in addition; leave them out")


def patients_by_id(cohort: Cohort) -> dict[str, str]:
    """Map every slide and every patient to the patient, because a table of splits may name either."""
    patient_of = {case.patient_id: case.patient_id for case in cohort.cases}
    return patient_of | {slide: case.patient_id for case in cohort.cases for slide in case.slides}


def _split_of(settings: TrainSettings, cohort: Cohort) -> Split:
    """Return the split of the patients, read from a table or drawn."""
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
