"""``--devices``: a process with its own model on each device of this machine, all of them members of one fleet.

The command itself then computes nothing: it starts the members, assigns each a share of the cores, shows their reports,
and forwards the signal that ends it. Claims decide which member runs which slide, as between machines.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Generic

from maskattn.cli.device_member import Work, run_member
from maskattn.cli.progress import ProgressBars
from maskattn.cli.reporting import in_one_line, tell
from maskattn.errors import SlideError
from maskattn.slide.each_slide import OutcomeT

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from maskattn.slide.shared_requests import SharedSettings

__all__ = ["devices_named", "run_on_devices", "settings_of_member", "shares_of_cores"]

_MOST_STARTS = 5
_UNWOUND_AFTER_S = 35.0  # a member ends itself after half a minute


def devices_named(text: str) -> list[str]:
    """Return the devices of ``--devices``, one for each process.

    Args:
        text: "all" is every GPU, or the CPU without one. Otherwise names separated by commas: N or cuda:N is a GPU,
            cpu is one process on the CPU, and cpu:N are N of them. A GPU that is named twice gets two processes.

    Raises:
        ValueError: it names no device, or a GPU that this machine does not have.
    """
    devices: list[str] = []
    for name in text.split(","):
        kind, _, number = name.strip().rpartition(":")
        if name.strip() == "cpu":
            devices.append("cpu")
        elif kind == "cpu" and number.isdecimal() and int(number):
            devices += ["cpu"] * int(number)
        elif kind in ("", "cuda") and number.isdecimal():
            devices.append(f"cuda:{int(number)}")
        elif text.strip() != "all":
            raise ValueError(
                "--devices takes all, or names separated by commas, such as 0,1 for two GPUs and cpu:4 for four "
                f"processes on the CPU, got {text!r}; name the devices of this machine, and one process is started for "
                "each"
            )
    asked = {device for device in devices if device.startswith("cuda")}
    if devices and not asked:
        return devices
    import torch

    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if missing := sorted(asked - set(found)):
        raise ValueError(
            f"--devices names GPUs of this machine, got {', '.join(missing)} where it has {len(found)}; count from 0, "
            "or give all"
        )
    return devices or found or ["cpu"]


def shares_of_cores(members: int) -> list[tuple[int, ...]]:
    """Divide the cores among processes; a share is () if the system cannot bind a process to cores.

    Shares do not overlap unless there are more processes than cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [()] * members
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < members:
        return [(cores[member % len(cores)],) for member in range(members)]
    edges = [round(member * len(cores) / members) for member in range(members + 1)]
    return [tuple(cores[first:last]) for first, last in itertools.pairwise(edges)]


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
class _Member(Generic[OutcomeT]):
    """The process of one device, and its state."""

    number: int
    device: str
    cores: tuple[int, ...]
    work: Work[OutcomeT]
    process: SpawnProcess | None = None
    starts: int = 0
    ran: int = 0
    done: bool = False
    error: Exception | None = None

    def start(self) -> Connection:
        """Start the process and return the connection for its reports."""
        ours, theirs = multiprocessing.Pipe()
        limit = self.work.settings.limit
        work = self.work
        if self.starts:
            left = None if limit is None else max(1, limit - self.ran)
            work = work.under(replace(work.settings, limit=left, retry_failed=False))
        self.starts += 1
        # A fork would inherit the locks of this process's threads, and its GPU.
        self.process = multiprocessing.get_context("spawn").Process(
            target=run_member, args=(theirs, self.device, self.cores), name=self.device
        )
        self.process.start()
        theirs.close()
        with contextlib.suppress(OSError):  # it ended immediately, which its exit code reports
            ours.send(work)
        return ours


@dataclass
class _Reports(Generic[OutcomeT]):
    """The reports of the members on the slides."""

    bars: ProgressBars[OutcomeT]
    own: dict[str, OutcomeT] = field(default_factory=dict)
    elsewhere: dict[str, OutcomeT] = field(default_factory=dict)
    printed: set[str] = field(default_factory=set)

    def take(self, member: _Member[OutcomeT], kind: str, *what: Any) -> None:
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
            self.own[outcome.slide_id] = outcome
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


def run_on_devices(
    devices: Sequence[str], work: Work[OutcomeT], slides: Sequence[str], bars: ProgressBars[OutcomeT]
) -> list[OutcomeT]:
    """Run slides in a process for each device.

    Args:
        devices: the devices, from :func:`devices_named`.
        work: the work that each process loads and runs.
        slides: the ids of all slides, in the order of the outcomes.
        bars: the progress bars, with a bar of tiles for each device.

    Returns:
        The outcome of each slide that was reached.

    Raises:
        Exception: no process could do its work; this is the error of the first that failed.
        SlideError: all processes were killed repeatedly.
    """
    count = len(devices) if work.settings.limit is None else min(len(devices), work.settings.limit)
    cores = shares_of_cores(count)
    members: list[_Member[OutcomeT]] = [
        _Member(number, devices[number], cores[number], work.under(settings_of_member(work.settings, number, count)))
        for number in range(count)
    ]
    reports = _Reports(bars)
    with _ended_together(members):
        _listen(members, reports)
    reports.end()
    errors = [(member.device, member.error) for member in members if member.error is not None]
    if not any(member.done for member in members):
        if errors:
            raise errors[0][1]
        raise SlideError(
            f"slides must not end the processes that run them, got {sum(member.starts for member in members)} that "
            "were killed, most often for lack of memory; name fewer --devices, or give a smaller --batch-size"
        )
    for device, error in errors:
        reports.tell(f"{device} failed, and the other devices ran its slides: {in_one_line(error)[0]}")
    found = reports.elsewhere | reports.own
    return [found[slide_id] for slide_id in slides if slide_id in found]


def _listen(members: Sequence[_Member[OutcomeT]], reports: _Reports[OutcomeT]) -> None:
    """Process the members' reports until all have ended; restart a member that is killed."""
    running = {member.start(): member for member in members}
    while running:
        for connection in wait(list(running)):
            assert isinstance(connection, Connection)
            member = running[connection]
            try:
                reports.take(member, *connection.recv())
                continue
            except (EOFError, OSError):
                connection.close()
                del running[connection]
            assert member.process is not None
            member.process.join()
            if member.done or member.error is not None:
                continue
            # A member is done only when all slides have ended.
            again = member.starts < _MOST_STARTS and not any(other.done for other in members)
            how = _how_it_ended(member.process.exitcode or 0)
            tell(f"the process of {member.device} {how}" + ("; it is being restarted" if again else ""))
            if again:
                running[member.start()] = member


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextlib.contextmanager
def _ended_together(members: Sequence[_Member[Any]]) -> Iterator[None]:
    """End the members together with this process, whatever ends it; each of them releases its slide."""
    try:
        yield
    finally:
        running = [member.process for member in members if member.process is not None and member.process.is_alive()]
        for process in running:
            process.terminate()
        for process in running:
            process.join(_UNWOUND_AFTER_S)
            process.kill()
            process.join()
