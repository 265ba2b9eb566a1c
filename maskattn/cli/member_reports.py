"""What the command knows of the processes that it started, and how it shows their reports."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic

from maskattn.cli.progress import ProgressBars
from maskattn.cli.reporting import in_one_line, tell
from maskattn.errors import SlideError
from maskattn.slide.each_slide import OutcomeT

if TYPE_CHECKING:
    from maskattn.cli.device_member import Work
    from maskattn.slide.shared_requests import SharedSettings

__all__ = [
    "MOST_STARTS",
    "UNWOUND_AFTER_S",
    "MemberState",
    "Reports",
    "how_it_ended",
    "outcomes_of",
    "settings_of_member",
]

MOST_STARTS = 5
UNWOUND_AFTER_S = 35.0  # a member ends itself after half a minute


def settings_of_member(settings: SharedSettings, member: int, members: int) -> SharedSettings:
    """Return the settings of one of several processes: its share of the limit, and by default largest slides first."""
    limit = settings.limit
    return replace(
        settings,
        order=settings.order or "large-first",
        limit=None if limit is None else limit // members + (member < limit % members),
        # Two processes that start at the same time would each retry the other's failures.
        retry_failed=settings.retry_failed and member == 0,
    )


@dataclass
class MemberState(Generic[OutcomeT]):
    """The process of one device, as the command knows it.

    Attributes:
        number: counted from 0; the bar of its tiles.
        device: the name of its device in messages.
        work: the work that it was given first.
        starts: how often it was started.
        ran: the number of slides that it ran.
        done: it came to the end of its slides.
        error: why it could not do its work, or None.
    """

    number: int
    device: str
    work: Work[OutcomeT]
    starts: int = 0
    ran: int = 0
    done: bool = False
    error: Exception | None = None

    def work_of_next_start(self) -> Work[OutcomeT]:
        """Count a start, and return the work that is left for it."""
        limit = self.work.settings.limit
        work = self.work
        if self.starts:
            left = None if limit is None else max(1, limit - self.ran)
            work = work.under(replace(work.settings, limit=left, retry_failed=False))
        self.starts += 1
        return work


@dataclass
class Reports(Generic[OutcomeT]):
    """The reports of the members on the slides."""

    bars: ProgressBars[OutcomeT]
    own: dict[str, OutcomeT] = field(default_factory=dict)
    elsewhere: dict[str, OutcomeT] = field(default_factory=dict)
    printed: set[str] = field(default_factory=set)

    def take(self, member: MemberState[OutcomeT], kind: str, *what: Any) -> None:
        """Process a report of a member."""
        if kind == "started":
            self.bars.slide_started(what[0], member.number)
        elif kind == "tiles":
            self.bars.tiles_done(what[0], what[1], member.number)
        elif kind == "ended":
            (outcome,) = what
            if outcome.elsewhere:
                self.elsewhere[outcome.slide_id] = outcome
                return
            member.ran += outcome.status != "skipped"
            # A process that was late to start may look at a slide again that has ended.
            again = outcome.slide_id in self.own
            if not again or outcome.status != "skipped":
                self.own[outcome.slide_id] = outcome
            if not again:
                self.bars.slide_ended(outcome)
        elif kind == "note":
            self.tell(*what)
        elif kind == "error":
            (member.error,) = what
        else:
            member.done = True

    def tell(self, text: str) -> None:
        """Print a line that several members may report, but only once."""
        if text not in self.printed:
            self.printed.add(text)
            tell(text)

    def end(self) -> None:
        """Report the slides that processes of other commands ran."""
        for slide_id, outcome in self.elsewhere.items():
            if slide_id not in self.own:
                self.bars.slide_ended(outcome)


def outcomes_of(
    members: Sequence[MemberState[OutcomeT]], reports: Reports[OutcomeT], slides: Sequence[str], remedy: str
) -> list[OutcomeT]:
    """Return the outcome of each slide that was reached, in the order of ``slides``, when all members have ended.

    Raises:
        Exception: no process could do its work; this is the error of the first that failed.
        SlideError: all processes were killed repeatedly; ``remedy`` says what to do about it.
    """
    reports.end()
    errors = [(member.device, member.error) for member in members if member.error is not None]
    if not any(member.done for member in members):
        if errors:
            raise errors[0][1]
        raise SlideError(
            f"slides must not end the processes that run them, got {sum(member.starts for member in members)} that "
            f"were killed, most often for lack of memory; {remedy}"
        )
    for device, error in errors:
        reports.tell(f"{device} failed, and the other devices ran its slides: {in_one_line(error)[0]}")
    found = reports.elsewhere | reports.own
    return [found[slide_id] for slide_id in slides if slide_id in found]


def how_it_ended(code: int) -> str:
    """Return an exit code in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
