"""Run: many slides, one after another. One that fails leaves the others unharmed, and ``summary.csv`` names it.

The summary has a slide's row as soon as the slide ends. Rows of other slides stay as they are, so that several runs may
fill one output folder, also at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from maskattn.errors import OutputError, SlideError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text, problem_of_id
from maskattn.slide.output_folder import are_one_name, clear_leftovers, find_finished, prepare_output
from maskattn.slide.pipeline import identify_model, predict_slide
from maskattn.slide.prediction import ModelIdentity, SlideOutcome, SlidePrediction
from maskattn.slide.request import RunSettings, check_request, differences
from maskattn.slide.summary import append_row, read_summary, tidy_summary

__all__ = ["RunProgress", "run_slides"]

_logger = logging.getLogger(__name__)


class RunProgress(Protocol):
    """What a run tells while it runs."""

    def slide_started(self, job: SlideJob) -> None:
        """A slide is about to be run."""

    def tiles_done(self, done: int, total: int) -> None:
        """So many of the current slide's tiles are through."""

    def slide_ended(self, outcome: SlideOutcome) -> None:
        """A slide is finished, skipped or failed, and the summary says so."""


def run_slides(
    jobs: Sequence[SlideJob], model: SlideModel, settings: RunSettings, progress: RunProgress | None = None
) -> list[SlideOutcome]:
    """Predict slides, skip those an earlier run finished, and keep ``settings.out_dir/summary.csv``.

    Args:
        jobs: the slides; their ids differ.
        model: the slide model, on the device to use.
        settings: how to run them.
        progress: told of every step.

    Returns:
        The outcome of each job, in order. A failed slide is an outcome, not an exception.

    Raises:
        ManifestError: some of what was asked for would have no effect.
        OutputError: the output folder, or its summary, cannot be written.
    """
    check_request(jobs, settings, model.config.masked)
    prepare_output(settings.out_dir)
    outcomes = []
    with _summary_of(settings.out_dir) as summary:
        identity = identify_model(model)
        for job in _distinct_here(jobs, settings.out_dir):
            if progress is not None:
                progress.slide_started(job)
            outcome = _run_one(job, model, identity, settings, progress)
            with _summary_errors(summary):
                append_row(summary, outcome.row())
            outcomes.append(outcome)
            if progress is not None:
                progress.slide_ended(outcome)
    return outcomes


def _distinct_here(jobs: Sequence[SlideJob], out_dir: Path) -> Iterator[SlideJob]:
    """The jobs; those whose id the file system takes for that of an earlier one fail."""
    first: dict[str, str] = {}
    for job in jobs:
        other = first.setdefault(unicodedata.normalize("NFC", job.slide_id).casefold(), job.slide_id)
        if other != job.slide_id and job.problem is None and are_one_name(out_dir, other, job.slide_id):
            yield replace(
                job,
                problem=f"a slide_id must differ from the others in more than case or accents where {as_text(out_dir)} "
                f"is, got {job.slide_id!r} and {other!r}; give it another in a manifest",
            )
        else:
            yield job


def _run_one(
    job: SlideJob, model: SlideModel, identity: ModelIdentity, settings: RunSettings, progress: RunProgress | None
) -> SlideOutcome:
    start = time.perf_counter()
    on_tiles = None if progress is None else progress.tiles_done
    try:
        problem = job.problem or problem_of_id(job.slide_id)
        if problem is not None:
            raise SlideError(problem)
        clear_leftovers(settings.out_dir, job.slide_id)
        finished = find_finished(settings.out_dir, job.slide_id)
        if finished is not None and not settings.overwrite:
            _check_same_request(finished, job, model, identity, settings)
            seconds = time.perf_counter() - start
            return SlideOutcome(job.slide_id, "skipped", "finished by an earlier run", seconds, finished)
        prediction = predict_slide(job, model, settings, on_tiles, identity)
        return SlideOutcome(job.slide_id, "ok", "", time.perf_counter() - start, prediction)
    except Exception as error:  # whatever befalls one slide, the others go on
        _logger.debug("slide %s failed", job.slide_id, exc_info=True)
        return SlideOutcome(job.slide_id, "failed", _reason(error, settings.out_dir), time.perf_counter() - start)


def _check_same_request(
    finished: SlidePrediction, job: SlideJob, model: SlideModel, identity: ModelIdentity, settings: RunSettings
) -> None:
    """Refuse to pass off the outputs of another request as this one's."""
    spacing_um = settings.spacing_um or job.spacing_um or finished.slide.spacing_um
    found_and_asked = [
        ("model", f"{finished.model.name} {finished.model.sha256}", f"{identity.name} {identity.sha256}"),
        ("slide file", Path(finished.slide.path).name, job.path.name),
        ("slide size in bytes", finished.slide.bytes, job.path.stat().st_size),
        ("spacing_um", finished.slide.spacing_um, spacing_um),
    ]
    other = [(name, found, asked) for name, found, asked in found_and_asked if found != asked]
    for name, found, asked in (*other, *differences(finished, job, settings, model.config.masked)):
        raise SlideError(
            f"a finished slide must have been run as asked, got {name}: {found} in {settings.out_dir / job.slide_id} "
            f"and asked for {asked}; run it again with --overwrite or choose another --out"
        )


@contextlib.contextmanager
def _summary_of(out_dir: Path) -> Iterator[Path]:
    """The run's summary: what cannot be read is found before the first slide, and it is tidied however the run ends."""
    path = out_dir / "summary.csv"
    with _summary_errors(path):
        read_summary(path)
    try:
        yield path
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            tidy_summary(path)
        raise
    with _summary_errors(path):
        tidy_summary(path)


@contextlib.contextmanager
def _summary_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise OutputError(str(error)) from error
    except OSError as error:
        raise OutputError(
            f"the summary must be a file that can be read and written, got {as_text(path)}: "
            f"{error.strerror or error}; free space or move it away and run again, finished slides are skipped"
        ) from error


def _reason(error: Exception, out_dir: Path) -> str:
    """An error in one line."""
    text = as_text(" ".join(str(error).split()))
    if isinstance(error, SlideError):
        return text
    # HDF5 reports a full disk in the words of its message alone.
    if isinstance(error, OSError) and (error.errno == errno.ENOSPC or os.strerror(errno.ENOSPC) in text):
        return f"outputs need room on their disk, got none left in {as_text(out_dir)}; free space and run it again"
    return f"{type(error).__name__}: {text}"[:500]
