"""The fleet as seen by one process: it yields the next slide to run, and cleans up when the process leaves."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from maskattn.errors import OutputError
from maskattn.slide.fleet.claims import Claim, Claims
from maskattn.slide.fleet.ended import EndedSlide, EndedSlides
from maskattn.slide.fleet.folders import remove_if_empty
from maskattn.slide.fleet.lists import list_slides
from maskattn.slide.fleet.members import Member, Watch, members_of, read_member
from maskattn.slide.fleet.put_away import put_away
from maskattn.slide.fleet.rows import MemberRows
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.fleet.uninterrupted import uninterrupted
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text, problem_of_id
from maskattn.slide.summary import read_summary, summary_errors

__all__ = ["FOLDER", "Fleet", "Turn", "joined"]

FOLDER = ".fleet"
_LOOK_AGAIN_AFTER_S = 0.5
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
# What a waiting process asks of the drive must not grow with the number of processes that run or wait.
_MOST_HELD_WATCHED = 32
_WAITING_LOOKS_PER_S, _LONGEST_SHARED_WAIT_S = 8.0, 60.0

Turn = tuple[int, SlideJob, "Claim | EndedSlide"]
"""A job's index, the job, and the claim under which to run it, or how it ended in another process."""


@contextlib.contextmanager
def joined(
    out_dir: Path,
    jobs: Sequence[SlideJob],
    sharing: Sharing,
    request: str,
    sweep: Callable[[], None],
) -> Iterator[Fleet]:
    """Join the processes that run the slides of an output folder.

    Args:
        out_dir: the output folder, which must exist.
        jobs: the slides of this process.
        sharing: how the slides are shared.
        request: a text that identifies the request; a slide that ended counts only for processes with the same text.
        sweep: removes leftovers of killed processes; called only when no other process is at work.

    Yields:
        The fleet, whose ``turns`` are the slides to run.

    Raises:
        OutputError: the summary, or a claim, cannot be written.
    """
    table = out_dir / "summary.csv"
    with summary_errors(table):
        read_summary(table)
    root = out_dir / FOLDER
    member = Member(root / "members", sharing.claim_timeout_s, {})
    fleet = Fleet(root, table, member, sharing, request)
    try:
        with uninterrupted():
            fleet.join(jobs, sweep)
        yield fleet
        fleet.leave()
    except BaseException:
        with contextlib.suppress(OutputError):
            fleet.leave()
        raise


class Fleet:
    """A process's view of all processes that share an output folder.

    Args:
        root: the fleet's folder.
        table: the path of ``summary.csv``.
        member: this process.
        sharing: how the slides are shared.
        request: a text that identifies the request.

    Attributes:
        ended: the slides that have ended.
        was_last: whether no other process was at work when this one left.
    """

    def __init__(self, root: Path, table: Path, member: Member, sharing: Sharing, request: str) -> None:
        self._root = root
        self._member = member
        self._sharing = sharing
        self._watch = Watch(root / "members", sharing.claim_timeout_s)
        self._claims = Claims(root / "claims", member.token, self._watch)
        self._rows = MemberRows(table, root / "rows", member.token, Claims(root, member.token, self._watch))
        self._began = time.monotonic()
        self._ran = self._done = 0
        self._lost: dict[int, SlideJob] = {}
        self._free: list[SlideJob] = []
        self._table = table
        self._has_left = False
        self.was_last = False
        self.ended = EndedSlides(root, request)

    def join(self, jobs: Sequence[SlideJob], sweep: Callable[[], None]) -> None:
        """Join the other processes; ``sweep`` is called if none is at work."""
        slides = list_slides(self._root, jobs)
        self._member.join(slides=slides, began=time.strftime("%Y-%m-%dT%H:%M:%S%z"), done=0)
        if not self.any_other():
            sweep()
        self.ended.forget_failed(lambda token: not self._sharing.retry_failed and self.is_at_work(token))

    def any_other(self) -> bool:
        """Return whether any other member is at work, as far as this process knows; it asks until it finds one."""
        tokens = [token for token in members_of(self._root / "members") if token != self._member.token]
        random.shuffle(tokens)
        return any(self.is_at_work(token) for token in tokens)

    def is_at_work(self, token: str) -> bool:
        """Return whether a member other than this process lives and is not about to leave."""
        if token == self._member.token or self._watch.has_ended(token):
            return False
        return not (read_member(self._root / "members", token) or {}).get("leaving")

    def turns(self, jobs: Sequence[SlideJob], prefer: Callable[[], str | None] = lambda: None) -> Iterator[Turn]:
        """Yield each slide when this process has claimed it, or when another process has ended it.

        The iterator waits for slides that other processes run, and takes over those whose owner ended. It stops after
        ``Sharing.limit`` slides of its own, without waiting for others.

        Args:
            jobs: the slides.
            prefer: returns the id of the slide to claim next if it is free; None for no preference.

        Raises:
            OutputError: a claim cannot be written.
        """
        left = dict(enumerate(jobs))
        self._lost.clear()
        misses, wait_s, looked_at = 0, _SHORTEST_WAIT_S, None
        claimed: set[str] = set()
        while left or self._lost:
            left |= self._lost
            self._lost.clear()
            if misses or looked_at is None or time.monotonic() - looked_at > _LOOK_AGAIN_AFTER_S:
                yield from self._ended_elsewhere(left)
                claimed, looked_at = self._claims.claimed(), time.monotonic()
            if self._sharing.limit is not None and self._ran >= self._sharing.limit:
                return
            free = [index for index, job in left.items() if _name(job) not in claimed]
            # If several processes compete for a slide, each continues with a random one.
            tried = [free[random.randrange(min(len(free), 2**misses))]] if free else self._watched(left)
            preferred = prefer()
            tried = [index for index in free if left[index].slide_id == preferred] or tried
            turn = next(filter(None, (self._turn(index, left[index]) for index in tried)), None)
            if turn is not None:
                del left[turn[0]]
                self._free = [left[index] for index in free if index in left]
                misses, wait_s = 0, _SHORTEST_WAIT_S
                yield turn
            elif free:
                misses = min(misses + 1, 16)
            elif left:
                misses = 1
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, self._longest_wait_s(len(claimed)), self._sharing.claim_timeout_s / 4)

    def next_slides(self) -> list[SlideJob]:
        """Slides that nobody had claimed when this process's present turn came, beginning with its likely next one.

        Of several processes each begins at another, so that they do not all prepare for the same.
        """
        if self._sharing.limit is not None and self._ran + 1 >= self._sharing.limit:
            return []
        before = sum(token < self._member.token for token in members_of(self._root / "members")) if self._free else 0
        return self._free[before:]

    def end(self, claim: Claim, row: Mapping[str, str]) -> None:
        """Add an ended slide's row to the summary, mark the slide as ended, and release its claim.

        Raises:
            OutputError: the summary cannot be written.
        """
        with uninterrupted():
            self._end(claim, row)

    def lose(self, index: int, job: SlideJob) -> None:
        """Return a slide that another process took over to ``turns``, which yields it again, usually once it ended."""
        self._lost[index] = job

    def leave(self) -> None:
        """Complete the summary; the last process also adds the rows of killed members, and removes the fleet's files.

        Called again, it does nothing.

        Raises:
            OutputError: the summary cannot be written.
        """
        with uninterrupted():
            if self._has_left:
                return
            self._has_left = True
            try:
                self._member.tell(leaving=True)
                with summary_errors(self._table):
                    self._complete_summary()
            finally:
                self._member.leave()
                remove_if_empty(*(self._root / name for name in ("claims", "members", "rows")), self._root)

    def _end(self, claim: Claim, row: Mapping[str, str]) -> None:
        try:
            with summary_errors(self._table):
                self._rows.add(row)
        except OutputError:
            claim.release()  # the slide did not end its process
            raise
        by = str(self._member.process)
        with contextlib.suppress(OSError):  # without a mark the other members check the slide themselves
            self.ended.mark(EndedSlide(claim.name, row["status"], row["reason"], by, self._member.token))
        claim.release()
        self._done += 1
        self._ran += row["status"] != "skipped"
        self._member.tell(done=self._done, seconds=round(time.monotonic() - self._began, 3))

    def _complete_summary(self) -> None:
        if self.any_other():
            self._rows.finish()
            return
        with self._rows.alone():
            self._rows.take_in_all(self._watch)
            self.was_last = not self.any_other()
            if self.was_last:
                put_away(self._root, self._member.token, self._watch)

    def _watched(self, left: Mapping[int, SlideJob]) -> list[int]:
        """Return which of the slides that others hold this process watches, to take them over when their owners end.

        Of many it watches the same few, which are others for each process, so that together they watch all.
        """

        def place(index: int) -> int:
            return zlib.crc32(f"{self._member.token} {index}".encode())

        return heapq.nsmallest(_MOST_HELD_WATCHED, left, key=place)

    def _longest_wait_s(self, held: int) -> float:
        """Return the longest wait between two looks, which is longer if many processes wait, as each may act on one."""
        waiting = sum(1 for _ in members_of(self._root / "members")) - held
        return min(max(_LONGEST_WAIT_S, waiting / _WAITING_LOOKS_PER_S), _LONGEST_SHARED_WAIT_S)

    def _turn(self, index: int, job: SlideJob) -> Turn | None:
        with uninterrupted():
            with summary_errors(self._table):
                claim = self._claims.try_claim(_name(job))
            if claim is None:
                return None
            slide = self.ended.find(_name(job))  # it may have ended just before it was claimed
            if slide is None:
                return index, job, claim
            claim.release()
            return index, job, slide

    def _ended_elsewhere(self, left: dict[int, SlideJob]) -> Iterator[Turn]:
        names = self.ended.names()
        for index in [index for index, job in left.items() if _name(job) in names]:
            slide = self.ended.find(_name(left[index]))
            if slide is not None:
                yield index, left.pop(index), slide


def _name(job: SlideJob) -> str:
    """Return the name of a slide's files in the fleet's folder; an id that cannot name a file is hashed."""
    if job.problem is None and problem_of_id(job.slide_id) is None:
        return job.slide_id
    return "no-name-" + hashlib.sha256(as_text(job.slide_id).encode()).hexdigest()[:16]
