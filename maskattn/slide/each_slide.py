"""Run many slides one after another; a slide that fails does not stop the others, and ``summary.csv`` names it.

Processes that were started with the same command share the slides (``fleet/``), and each slide is run by one of them.
A slide's row is written to the summary as soon as the slide ends. Rows of other slides are kept, so that different runs
may fill one output folder, even at the same time.
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
from typing import Generic, Protocol, TypeVar, runtime_checkable

from maskattn.errors import SlideError
from maskattn.slide.fleet.claims import Claim, ClaimLostError
from maskattn.slide.fleet.fleet import joined
from maskattn.slide.fleet.sharing import Sharing, chosen_jobs
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text, problem_of_id
from maskattn.slide.outcome import Outcome, Status
from maskattn.slide.output_folder import are_one_name, prepare_output
from maskattn.slide.remote import CacheSettings, Copies
from maskattn.slide.summary import carried_into

__all__ = ["LeavesTogether", "OnTiles", "OutcomeT", "RunProgress", "run_each"]

_logger = logging.getLogger(__name__)

# A slide that so many processes did not survive is not tried again.
_MOST_ENDED = 5

OnTiles = Callable[[int, int], None]
"""Takes the number of tiles done and the number of all tiles of the current slide."""

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
        """``done`` of the current slide's ``total`` tiles are processed."""

    def slide_ended(self, outcome: _OutcomeIn) -> None:
        """A slide is finished, skipped or failed, and its row in the summary is written."""


@runtime_checkable
class LeavesTogether(Protocol):
    """A progress that also says when this process may leave the others that share the slides.

    A process that joins after all others have left would take their slides for those of an earlier run.
    """

    def no_slide_left(self) -> None:
        """There is no slide left for this process, which leaves when this returns."""


def run_each(
    jobs: Sequence[SlideJob],
    out_dir: Path,
    outcome_of: Callable[[str, Status, str, float, _Left | None], OutcomeT],
    finished: Callable[[SlideJob, Claim | None], _Left | None],
    run: Callable[[SlideJob, Claim, OnTiles | None], _Left],
    progress: RunProgress[OutcomeT] | None = None,
    *,
    sharing: Sharing,
    cache: CacheSettings | None = None,
    request: str,
    sweep: Callable[[], None],
    at_end: Callable[[list[OutcomeT]], None] = lambda outcomes: None,
) -> list[OutcomeT]:
    """Run slides together with the other processes of the same command, and keep ``out_dir/summary.csv``.

    Args:
        jobs: the slides, with distinct ids.
        out_dir: the output folder, created if it does not exist.
        outcome_of: makes an outcome from the fields of :class:`Outcome` and the result of ``finished`` or ``run``.
        finished: (slide, its claim) → the result of an earlier run, whose slide is skipped; None if there is none.
            Called without a claim, it changes nothing.
        run: (slide, its claim, progress of its tiles) → its result. An exception of ``finished`` or ``run`` fails the
            slide, with its message as the reason.
        progress: called at every step.
        sharing: how the slides are shared among processes.
        cache: where remote slides are copied to, each while its predecessor runs; None takes the default.
        request: a description of the request, the same in all processes of a command.
        sweep: removes incomplete outputs of killed processes; called only when no other process is at work.
        at_end: called with the outcomes by the last process, when all slides have ended.

    Returns:
        The outcomes in the order of the jobs; with a limit, only those of the slides that were run. A failed slide is
        an outcome, not an exception. The outcome of a slide that another process ran says only that.

    Raises:
        ManifestError: the requested share of the slides does not exist.
        OutputError: the output folder, or its summary, cannot be written.
    """
    prepare_output(out_dir)
    jobs = list(_distinct_here(chosen_jobs(jobs, sharing), out_dir))
    outcomes: dict[int, OutcomeT] = {}
    on_tiles = None if progress is None else progress.tiles_done
    any_remote = any(job.is_remote for job in jobs)
    with joined(out_dir, jobs, sharing, request, sweep) as fleet, Copies(cache or CacheSettings()) as copies:

        def run_copied(job: SlideJob, claim: Claim, on_tiles: OnTiles | None) -> _Left:
            with copies.local(job) as here:
                if any_remote:
                    copies.fetch_ahead(fleet.next_slides(), lambda other: _seems_finished(finished, other))
                return run(here, claim, on_tiles)

        for index, job, turn in fleet.turns(jobs, lambda: copies.ahead):
            if progress is not None:
                progress.slide_started(job)
            if isinstance(turn, Claim):
                try:
                    outcomes[index] = _run(job, turn, outcome_of, finished, run_copied, on_tiles, out_dir, copies)
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
                remote = outcome_of(job.slide_id, "failed" if failed else "skipped", why, 0.0, None)
                outcomes[index] = replace(remote, elsewhere=True)
            if progress is not None:
                progress.slide_ended(outcomes[index])
        if isinstance(progress, LeavesTogether):
            progress.no_slide_left()
    in_order = [outcomes[index] for index in sorted(outcomes)]
    if fleet.was_last:
        at_end(in_order)
    return in_order


def _run(
    job: SlideJob,
    claim: Claim,
    outcome_of: Callable[[str, Status, str, float, _Left | None], OutcomeT],
    finished: Callable[[SlideJob, Claim | None], _Left | None],
    run: Callable[[SlideJob, Claim, OnTiles | None], _Left],
    on_tiles: OnTiles | None,
    out_dir: Path,
    copies: Copies,
) -> OutcomeT:
    """Run one slide and return its outcome; any exception but a lost claim becomes the outcome "failed".

    Raises:
        ClaimLostError: another process took the slide over, whatever else then went wrong.
    """
    start, left = time.perf_counter(), None
    try:
        problem = job.problem or problem_of_id(job.slide_id) or _problem_of(claim)
        if problem is not None:
            raise SlideError(problem)
        job = copies.identified(job)
        left = finished(job, claim)
        status, reason = _OK if left is None else _SKIPPED
        if left is None:
            left = run(job, claim, on_tiles)
    except ClaimLostError:
        raise
    except Exception as error:
        claim.check()  # a process that takes the slide over removes this one's files
        _logger.debug("slide %s failed", job.slide_id, exc_info=True)
        status, reason = "failed", _reason(error, out_dir)
    return outcome_of(job.slide_id, status, reason, time.perf_counter() - start, left)


def _seems_finished(finished: Callable[[SlideJob, Claim | None], _Left | None], job: SlideJob) -> bool:
    """Whether a slide will probably not be run when its turn comes; its store is not asked."""
    try:
        return finished(job, None) is not None
    except Exception:
        return True


def _problem_of(claim: Claim) -> str | None:
    """Return why a slide is not tried again, or None."""
    if claim.number <= _MOST_ENDED:
        return None
    return (
        f"a slide must not end the processes that run it, got {claim.number - 1} that were killed while running it, "
        "most often for lack of memory; run it alone, with a smaller --batch-size and --workers 0"
    )


def _distinct_here(jobs: Sequence[SlideJob], out_dir: Path) -> Iterator[SlideJob]:
    """Yield the jobs; one whose id is the same file name as an earlier id on this file system gets a problem."""
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
    """Return an error's message in one line."""
    text = as_text(" ".join(str(error).split()))
    if isinstance(error, SlideError):
        return text
    # HDF5 reports a full disk as an OSError or RuntimeError that only its message identifies.
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or (isinstance(error, OSError | RuntimeError) and os.strerror(errno.ENOSPC) in text):
        return f"outputs need free space on their disk, got none left in {as_text(out_dir)}; free space and run again"
    return f"{type(error).__name__}: {text}"[:500]
