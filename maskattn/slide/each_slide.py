"""Each of many slides, one after another: one that fails leaves the others unharmed, and ``summary.csv`` names it.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from maskattn.errors import OutputError, SlideError
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text, problem_of_id
from maskattn.slide.output_folder import are_one_name, prepare_output
from maskattn.slide.summary import append_row, carried_into, read_summary, tidy_summary

__all__ = ["OnTiles", "Outcome", "OutcomeT", "RunProgress", "run_each"]

_logger = logging.getLogger(__name__)

OnTiles = Callable[[int, int], None]


class Outcome(Protocol):
    """What became of a slide."""

    @property
    def slide_id(self) -> str:
        """The job's id."""

    def row(self) -> dict[str, str]:
        """The outcome as a row of ``summary.csv``."""


OutcomeT = TypeVar("OutcomeT", bound=Outcome)
_OutcomeIn = TypeVar("_OutcomeIn", bound=Outcome, contravariant=True)


class RunProgress(Protocol, Generic[_OutcomeIn]):
    """What a run tells while it runs."""

    def slide_started(self, job: SlideJob) -> None:
        """A slide is about to be run."""

    def tiles_done(self, done: int, total: int) -> None:
        """So many of the current slide's tiles are through."""

    def slide_ended(self, outcome: _OutcomeIn) -> None:
        """A slide is finished, skipped or failed, and the summary says so."""


def run_each(
    jobs: Sequence[SlideJob],
    out_dir: Path,
    run_one: Callable[[SlideJob, OnTiles | None], OutcomeT],
    failed: Callable[[SlideJob, str, float], OutcomeT],
    progress: RunProgress[OutcomeT] | None = None,
) -> list[OutcomeT]:
    """Run slides and keep ``out_dir/summary.csv``.

    Args:
        jobs: the slides; their ids differ.
        out_dir: where outputs go to; made if it is not there.
        run_one: (slide, what is told of tiles) → its outcome; what it raises is why the slide failed.
        failed: (slide, why, seconds) → the outcome of a slide that failed.
        progress: told of every step.

    Returns:
        The outcome of each job, in order. A failed slide is an outcome, not an exception.

    Raises:
        OutputError: the output folder, or its summary, cannot be written.
    """
    prepare_output(out_dir)
    outcomes = []
    on_tiles = None if progress is None else progress.tiles_done
    with _summary_of(out_dir) as summary:
        for job in _distinct_here(jobs, out_dir):
            if progress is not None:
                progress.slide_started(job)
            start = time.perf_counter()
            try:
                problem = job.problem or problem_of_id(job.slide_id)
                if problem is not None:
                    raise SlideError(problem)
                outcome = run_one(job, on_tiles)
            except Exception as error:  # whatever befalls one slide, the others go on
                _logger.debug("slide %s failed", job.slide_id, exc_info=True)
                outcome = failed(job, _reason(error, out_dir), time.perf_counter() - start)
            with _summary_errors(summary):
                append_row(summary, carried_into(outcome.row(), job.carried))
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
    # HDF5 reports a full disk in the words of its message alone, as an OSError or a RuntimeError.
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or (isinstance(error, OSError | RuntimeError) and os.strerror(errno.ENOSPC) in text):
        return f"outputs need room on their disk, got none left in {as_text(out_dir)}; free space and run it again"
    return f"{type(error).__name__}: {text}"[:500]
