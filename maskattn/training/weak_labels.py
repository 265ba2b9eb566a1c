"""Slides with weak labels: each tile has the label of its slide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from maskattn.evaluation.predictions import some_of
from maskattn.slide.manifest import SlideJob, collect_jobs
from maskattn.slide.manifest.remote_slides import refuse_remote
from maskattn.slide.names import as_text
from maskattn.training.cohort import Cohort, cohort_from
from maskattn.training.labels import read_labels
from maskattn.training.settings import TrainSettings
from maskattn.training.slide_tiles import LaidSlides, lay_slides

__all__ = ["labelled_slides", "with_tiles"]

_FEWEST = 2


def labelled_slides(
    settings: TrainSettings, on_note: Callable[[str], None] | None = None
) -> tuple[Cohort, dict[str, SlideJob]]:
    """Return the cohort of the slides that have a label, and the job of each slide.

    Args:
        settings: the settings of the training; without a task, the number of classes makes it binary or multiclass.
        on_note: called with a sentence about what is left out.

    Raises:
        ValueError: a required setting is missing, no slide is found, or the labels cannot be used.
        IncompleteCohortError: slides lack a file or a label, without ``skip_missing``.
    """
    if settings.labels is None or settings.target is None:
        lacking = " and ".join(f"--{name}" for name in ("labels", "target") if getattr(settings, name) is None)
        raise ValueError(f"tiles of --slides have their slide's label, from --labels and --target, got no {lacking}")
    task = settings.task or "multiclass"
    if task not in ("binary", "multiclass", "ordinal"):
        raise ValueError(
            f"an encoder learns classes from slides, got --task {task}; take binary, multiclass or ordinal"
        )
    assert settings.slides is not None, "the caller has slides"
    labels = read_labels(settings.labels, [settings.target], settings.slide_table)
    collected = collect_jobs([settings.slides], on_note)
    refuse_remote(collected, "train")
    jobs = {job.slide_id: job for job in collected}
    files = {slide: job.path for slide, job in jobs.items()}
    cohort = cohort_from(settings, task, labels, files, on_note, "a slide file")
    if settings.task is None and len(cohort.classes) == 2:
        cohort = replace(cohort, task="binary")
    return cohort, {slide: jobs[slide] for slide in cohort.slides}


def with_tiles(
    cohort: Cohort,
    jobs: dict[str, SlideJob],
    settings: TrainSettings,
    on_slide: Callable[[str, int, int], None] | None = None,
) -> tuple[Cohort, LaidSlides]:
    """Return the cohort of the slides that can be read and show tissue, and their tiles; other slides are left out.

    Args:
        cohort: a cohort of :func:`labelled_slides`.
        jobs: slide → its job.
        settings: the settings of the training.
        on_slide: called as on_slide(slide, number done, number of slides).

    Raises:
        ValueError: a class has fewer than two patients left, or the encoder cannot be used.
    """
    laid = lay_slides(jobs, settings, on_slide)
    kept = [
        replace(case, slides={s: path for s, path in case.slides.items() if s in laid.tiles}) for case in cohort.cases
    ]
    cases = tuple(case for case in kept if case.slides)
    for index, name in enumerate(cohort.classes):
        patients = {case.patient_id for case in cases if int(case.truth[0]) == index}
        if len(patients) < _FEWEST:
            why = "".join(f"; {slide}: {reason}" for slide, reason in list(laid.unusable.items())[:1])
            raise ValueError(
                f"every class must have {_FEWEST} patients or more whose slides can be read, got {len(patients)} of "
                f"{as_text(name)}, with {len(laid.unusable)} slides left out ({some_of(list(laid.unusable)) or 'none'})"
                f"{why}"
            )
    return replace(cohort, cases=cases, left_out=cohort.left_out | laid.unusable), laid
