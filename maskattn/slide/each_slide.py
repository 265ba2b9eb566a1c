"""Each of many slides, one after another: one that fails leaves the others unharmed, and ``summary.csv`` names it.

Processes that were started with the same command share the slides (``fleet/``), and each slide is run by one of them.
The summary has a slide's row as soon as the slide ends. Rows of other slides stay as they are, so that different runs
may fill one output folder, also at once.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from maskattn.errors import SlideError
from maskattn.slide.fleet.claims import Claim, ClaimLostError
from maskattn.slide.fleet.fleet import joined
from maskattn.slide.fleet.sharing import Sharing, chosen_jobs
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text, problem_of_id
from maskattn.slide.outcome import Outcome, Status
from maskattn.slide.output_folder import are_one_name, prepare_output
from maskattn.slide.summary import carried_into

__all__ = ["OnTiles", "OutcomeT", "RunProgress", "run_each"]

_logger = logging.getLogger(__name__)

_MOST_ENDED = 5
OnTiles = Callable[[int, int], None]


_OK: tuple[Status, str] = ("ok", "")
_SKIPPED: tuple[Status, str] = ("skipped", "finished by an earlier run")

OutcomeT = TypeVar("OutcomeT", bound=Outcome)
_Left = TypeVar("_Left")
_OutcomeIn = TypeVar("_OutcomeIn", bound=Outcome, contravariant=True)


class RunProgress(Protocol, Generic[_OutcomeIn]):
    """The progress that a run reports."""

    def slide_started(self, job: SlideJob) -> None:
        """A slide is about to be run."""

    def tiles_done(self, done: int, total: int) -> None:
        """So many of the current slide's tiles are through."""

    def slide_ended(self, outcome: _OutcomeIn) -> None:
        """A slide is finished, skipped or failed, and the summary says so."""


def run_each(
    jobs: Sequence[SlideJob],
    out_dir: Path,
    outcome_of: Callable[[str, Status, str, float, _Left | None], OutcomeT],
    finished: Callable[[SlideJob, Claim], _Left | None],
    run: Callable[[SlideJob, Claim, OnTiles | None], _Left],
    progress: RunProgress[OutcomeT] | None = None,
    *,
    sharing: Sharing,
    request: str,
    sweep: Callable[[], None],
    at_end: Callable[[list[OutcomeT]], None] = lambda outcomes: None,
) -> list[OutcomeT]:
    """Run slides together with the other processes of the same command, and keep ``out_dir/summary.csv``.

    Args:
        jobs: the slides; their ids differ.
        out_dir: where outputs go to; made if it is not there.
        outcome_of: makes an outcome of the fields of :class:`Outcome` and what this process has left of the slide.
        finished: (slide, its claim) → what an earlier run left of it, and it is skipped; None where there is nothing.
        run: (slide, its claim, progress of its tiles) → its outcome. An error of these two is the reason of failure.
        progress: called at every step.
        sharing: how the slides are shared.
        request: what was asked for, in words; the same for all processes of a command.
        sweep: removes what killed processes left half written; called where no other process is at work.
        at_end: what the last process does with the outcomes when all slides have ended.

    Returns:
        The outcome of each job, in order; with a limit, of those that were come to. A failed slide is an outcome, not
        an exception, and so is one that another process ran, of which it says only that.

    Raises:
        ManifestError: there is no such share of the slides.
        OutputError: the output folder, or its summary, cannot be written.
    """
    prepare_output(out_dir)
    jobs = list(_distinct_here(chosen_jobs(jobs, sharing), out_dir))
    outcomes: dict[int, OutcomeT] = {}
    on_tiles = None if progress is None else progress.tiles_done
    with joined(out_dir, jobs, sharing, request, sweep) as fleet:
        for index, job, turn in fleet.turns(jobs):
            if progress is not None:
                progress.slide_started(job)
            if isinstance(turn, Claim):
                try:
                    outcomes[index] = _run(job, turn, outcome_of, finished, run, on_tiles, out_dir)
                except ClaimLostError:
                    fleet.lose(index, job)
                    continue
                except BaseException:
                    turn.release()
                    raise
                fleet.end(turn, carried_into(outcomes[index].row(), job.carried))
            else:
                failed = turn.status == "failed"
                why = f"{turn.reason} ({turn.by})" if failed else f"run by {turn.by}"
                there = outcome_of(job.slide_id, "failed" if failed else "skipped", why, 0.0, None)
                outcomes[index] = replace(there, elsewhere=True)
            if progress is not None:
                progress.slide_ended(outcomes[index])
    in_order = [outcomes[index] for index in sorted(outcomes)]
    if fleet.was_last:
        at_end(in_order)
    return in_order


def _run(
    job: SlideJob,
    claim: Claim,
    outcome_of: Callable[[str, Status, str, float, _Left | None], OutcomeT],
    finished: Callable[[SlideJob, Claim], _Left | None],
    run: Callable[[SlideJob, Claim, OnTiles | None], _Left],
    on_tiles: OnTiles | None,
    out_dir: Path,
) -> OutcomeT:
    """A slide's outcome; whatever befalls it, the others go on."""
    start, left = time.perf_counter(), None
    try:
        problem = job.problem or problem_of_id(job.slide_id) or _problem_of(claim)
        if problem is not None:
            raise SlideError(problem)
        left = finished(job, claim)
        status, reason = _OK if left is None else _SKIPPED
        if left is None:
            left = run(job, claim, on_tiles)
    except ClaimLostError:
        raise
    except Exception as error:
        _logger.debug("slide %s failed", job.slide_id, exc_info=True)
        status, reason = "failed", _reason(error, out_dir)
    return outcome_of(job.slide_id, status, reason, time.perf_counter() - start, left)


def _problem_of(claim: Claim) -> str | None:
    """Why a slide is not tried once more, or None."""
    if claim.number <= _MOST_ENDED:
        return None
    return (
        f"a slide must not end the processes that run it, got {claim.number - 1} that ended while they were at work "
        "on it: they were killed, most often for want of memory; run it alone, with a smaller --batch-size and "
        "--workers 0"
    )


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
