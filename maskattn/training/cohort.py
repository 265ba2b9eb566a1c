"""The cohort of a training: labels and features matched case by case, with checks of both.

A case is the unit that gets one prediction: a patient with all slides, or, with ``fusion="none"``, one slide.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskattn.evaluation.predictions import Task, some_of
from maskattn.slide.layouts import list_features
from maskattn.slide.names import as_text
from maskattn.training.labels import SlideLabel, SlideLabels, read_labels
from maskattn.training.settings import TrainSettings
from maskattn.training.truths import classes_of, read_truth

__all__ = ["Case", "Cohort", "IncompleteCohortError", "cohort_from", "cohort_of"]


class IncompleteCohortError(ValueError):
    """Slides lack features or a label; ``left_out`` maps each of them to the reason."""

    def __init__(self, message: str, left_out: Mapping[str, str]) -> None:
        super().__init__(message)
        self.left_out = dict(left_out)


@dataclass(frozen=True)
class Case:
    """The unit that gets one prediction.

    Attributes:
        case_id: the patient's id, or the slide's with ``fusion="none"``.
        patient_id: the patient's id.
        slides: slide id → file of features, or the slide itself.
        truth: (class index,), (value,), or for survival (time, event).
    """

    case_id: str
    patient_id: str
    slides: dict[str, Path]
    truth: tuple[float, ...]


@dataclass(frozen=True)
class Cohort:
    """The cases of a training.

    Attributes:
        cases: the cases, in the order of the labels.
        task: one of :data:`maskattn.evaluation.TASKS`.
        target: the name of the target.
        classes: the names of the classes, in order; empty for regression and survival.
        left_out: slide → the reason why it takes no part.
    """

    cases: tuple[Case, ...]
    task: Task
    target: str
    classes: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def slides(self) -> dict[str, Path]:
        """The file of features of every slide, by slide id."""
        return {slide: path for case in self.cases for slide, path in case.slides.items()}

    @property
    def patients(self) -> list[str]:
        """The patient of each case."""
        return [case.patient_id for case in self.cases]

    @property
    def strata(self) -> list[float]:
        """The value by which splits are stratified, per case: the class, the value, or whether there was an event."""
        return [case.truth[-1] for case in self.cases]

    def of(self, patients: Sequence[str]) -> list[Case]:
        """Return the cases of some patients.

        Raises:
            ValueError: a patient has no case.
        """
        wanted = set(patients)
        if lacking := sorted(wanted - set(self.patients)):
            raise ValueError(
                f"a split must have patients of the labels, got {some_of(lacking)}, who have no slide with features; "
                "leave them out of the split"
            )
        return [case for case in self.cases if case.patient_id in wanted]


def cohort_of(settings: TrainSettings, on_note: Callable[[str], None] | None = None) -> Cohort:
    """Read the labels, list the features, and match them.

    Args:
        settings: the settings of the training.
        on_note: called with a sentence about the slides that ``skip_missing`` leaves out.

    Raises:
        ValueError: a required setting or a column is missing, or there is only one class.
        IncompleteCohortError: slides lack features or a label, without ``skip_missing``.
    """
    features, source, task = _needed(settings)
    columns = [settings.time, settings.event] if task == "survival" else [settings.target]
    labels = read_labels(source, [name for name in columns if name is not None], settings.slide_table)
    return cohort_from(settings, task, labels, list_features(features), on_note)


def cohort_from(
    settings: TrainSettings,
    task: Task,
    labels: SlideLabels,
    files: Mapping[str, Path],
    on_note: Callable[[str], None] | None = None,
    what: str = "features",
) -> Cohort:
    """Match labels and files.

    Args:
        settings: the settings of the training.
        task: the task.
        labels: the labels of the slides.
        files: slide → its file.
        on_note: called with a sentence about the slides that ``skip_missing`` leaves out.
        what: the noun for a file in messages.

    Raises:
        ValueError: there is only one class, or a patient's labels contradict each other.
        IncompleteCohortError: slides lack a file or a label, without ``skip_missing``.
    """
    kept, left_out = _matched(labels, files, settings, on_note, what)
    classes: tuple[str, ...] = ()
    if task in ("binary", "multiclass", "ordinal"):
        classes = classes_of(task, [row.values[labels.columns[0]] or "" for row in kept], settings, labels.source)
    cases = _cases(kept, files, labels, settings, classes, task)
    target = settings.target or settings.event or task
    return Cohort(tuple(cases), task, target, classes, left_out)


def _needed(settings: TrainSettings) -> tuple[Path, Path, Task]:
    """Return the settings that every training of a slide model requires: features, labels and task."""
    needed = ["features", "labels", "task"]
    needed += ["time", "event"] if settings.task == "survival" else ["target"]
    if lacking := [f"--{name}" for name in needed if getattr(settings, name) is None]:
        raise ValueError(
            f"a training must have {', '.join(f'--{name}' for name in needed)}, got no {', '.join(lacking)}"
        )
    assert settings.features is not None
    assert settings.labels is not None
    assert settings.task is not None
    unused = {"survival": ("classes",), "regression": ("classes", "time", "event")}
    given = [name for name in unused.get(settings.task, ("time", "event")) if getattr(settings, name) is not None]
    if given:
        raise ValueError(f"a {settings.task} task has no use for {', '.join(given)}, got them; leave them out")
    return settings.features, settings.labels, settings.task


def _matched(
    labels: SlideLabels,
    files: Mapping[str, Path],
    settings: TrainSettings,
    on_note: Callable[[str], None] | None,
    what: str,
) -> tuple[list[SlideLabel], dict[str, str]]:
    """Return the rows that have a label and a file, and for every other slide the reason."""
    named = {row.slide_id for row in labels.rows}
    lacking = {
        f"have a label and no {what}": [row.slide_id for row in labels.rows if row.slide_id not in files],
        f"have {what} and no row of labels": [slide for slide in files if slide not in named],
        f"have nothing, NaN or NA in {' or '.join(labels.columns)}": labels.without_label(),
    }
    left_out = {slide: why for why, slides in lacking.items() for slide in slides}
    kept = [row for row in labels.rows if row.slide_id not in left_out]
    counted = "; ".join(f"{len(slides)} {why} ({some_of(slides, 3)})" for why, slides in lacking.items() if slides)
    if not kept:
        one, other = labels.rows[0].slide_id, next(iter(files))
        near = difflib.get_close_matches(one, files, 1)
        raise IncompleteCohortError(
            f"slides must have a label and {what}, got none that has both: {counted}; the labels have ids such as "
            f"{one!r}, the {what} such as {(near or [other])[0]!r}: use the same ids",
            left_out,
        )
    if left_out and not settings.skip_missing:
        raise IncompleteCohortError(
            f"every slide must have a label and {what}, got {counted}, of {len(named | set(files))} slides; complete "
            "them, or leave these slides out with --skip-missing",
            left_out,
        )
    if left_out and on_note is not None:
        on_note(f"{len(left_out)} slides are left out: {counted}")
    return kept, left_out


def _cases(
    rows: Sequence[SlideLabel],
    files: Mapping[str, Path],
    labels: SlideLabels,
    settings: TrainSettings,
    classes: tuple[str, ...],
    task: Task,
) -> list[Case]:
    found: dict[str, Case] = {}
    for row in rows:
        truth = read_truth(task, [row.values[name] or "" for name in labels.columns], classes, row.slide_id)
        name = row.slide_id if settings.fusion == "none" else row.patient_id
        other = found.get(name)
        if other is not None and other.truth != truth:
            raise ValueError(
                f"a patient must have one label, got different ones on the slides of {name!r} (the first that differs "
                f"is {row.slide_id!r}) in {as_text(labels.source)}; correct them, or predict each slide separately "
                "with --fusion none"
            )
        slides = {} if other is None else other.slides
        found[name] = Case(name, row.patient_id, {**slides, row.slide_id: files[row.slide_id]}, truth)
    return list(found.values())
