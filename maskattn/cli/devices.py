"""``--devices``: a process with its own model on each device of this machine, all of them members of one fleet.

The command itself then computes nothing: it starts the members, assigns each a share of the cores, shows their reports,
and forwards the signal that ends it. Claims decide which member runs which slide, as between machines.

If all members are on the CPU, the command loads the model and forks them, so that torch is imported and the weights are
in memory once. A member with a GPU is a new process, because a fork cannot use a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Generic

from maskattn.cli.device_member import ENDING_SIGNALS, Run, Work, run_forked, run_member
from maskattn.cli.free_memory import PROCESS_GIB, devices_that_fit, free_gib
from maskattn.cli.member_reports import (
    MOST_STARTS,
    UNWOUND_AFTER_S,
    MemberState,
    Reports,
    how_it_ended,
    outcomes_of,
    settings_of_member,
)
from maskattn.cli.progress import ProgressBars
from maskattn.cli.reporting import tell
from maskattn.slide.each_slide import OutcomeT

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess, SpawnProcess

__all__ = ["devices_named", "loaded_once", "run_on_devices", "shares_of_cores", "within_memory"]


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


def within_memory(devices: Sequence[str], process_gib: float | None) -> list[str]:
    """Return the devices whose processes fit into the machine's free memory, and tell if some do not.

    Args:
        devices: from :func:`devices_named`.
        process_gib: memory that a process needs in GiB; None takes what it needs at least.
    """
    need_gib, free = process_gib or PROCESS_GIB, free_gib()
    fitting = devices_that_fit(devices, need_gib, free)
    if free is not None and len(fitting) < len(devices):
        started = "one is started" if len(fitting) == 1 else f"{len(fitting)} are started"
        tell(
            f"{len(devices)} processes of {need_gib:g} GiB need {len(devices) * need_gib:g} GiB of memory, got "
            f"{free:.1f} GiB free: {started}; --memory-gib says what a process needs"
        )
    return fitting


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


@dataclass(frozen=True)
class _Loaded(Generic[OutcomeT]):
    """What the command has loaded for the members that it forks: a model's run, and the number of torch's threads."""

    run: Run[OutcomeT]
    threads: int


@dataclass
class _Member(MemberState[OutcomeT]):
    """The process of one device, and its state; ``waits`` until all members may leave."""

    cores: tuple[int, ...] = ()
    loaded: _Loaded[OutcomeT] | None = None
    waits: bool = False
    process: ForkProcess | SpawnProcess | None = None

    def start(self) -> Connection:
        """Start the process and return the connection for its reports."""
        ours, theirs = multiprocessing.Pipe()
        self.waits = False
        work = self.work_of_next_start()
        if self.loaded is not None:
            self._fork(ours, theirs, work.settings, self.loaded)
            theirs.close()
            return ours
        # A fork would inherit the locks of this process's threads, and its GPU.
        self.process = multiprocessing.get_context("spawn").Process(
            target=run_member, args=(theirs, self.device, self.cores, True), name=self.device
        )
        self.process.start()
        theirs.close()
        with contextlib.suppress(OSError):  # it ended immediately, which its exit code reports
            ours.send(work)
        return ours

    def _fork(self, ours: Connection, theirs: Connection, settings: Any, loaded: _Loaded[OutcomeT]) -> None:
        arguments = (theirs, ours, self.cores, loaded.threads, loaded.run, settings)
        self.process = multiprocessing.get_context("fork").Process(target=run_forked, args=arguments, name=self.device)
        # A signal must not reach the fork before it has let go of the command's way to end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loaded_once(devices: Sequence[str], work: Work[OutcomeT]) -> _Loaded[OutcomeT] | None:
    """Load the model for members to fork; None if they must load it themselves.

    Raises:
        Exception: it cannot be loaded.
    """
    remote = any(job.is_remote for job in work.jobs)  # fsspec runs a thread
    # A fork cannot use threads that torch, once imported, may have started.
    if sys.platform != "linux" or len(devices) < 2 or set(devices) != {"cpu"} or remote or "torch" in sys.modules:
        return None
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that loading starts none
    try:
        note, run = work.on("cpu")
    finally:
        torch.set_num_threads(threads)
    if note:
        tell(note)
    gc.freeze()  # a collection in a fork would write to, and so copy, all memory that it shares with this process
    return _Loaded(run, threads)


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
    loaded = loaded_once(devices[:count], work)
    members: list[_Member[OutcomeT]] = [
        _Member(
            number,
            devices[number],
            work.under(settings_of_member(work.settings, number, count)),
            cores=share,
            loaded=loaded,
        )
        for number, share in enumerate(shares_of_cores(count))
    ]
    reports = Reports(bars)
    with _ended_together(members):
        _listen(members, reports)
    return outcomes_of(members, reports, slides, "name fewer --devices, or give a smaller --batch-size")


def _listen(members: Sequence[_Member[OutcomeT]], reports: Reports[OutcomeT]) -> None:
    """Process the members' reports until all have ended; restart a member that is killed.

    Members leave together: one that joined after the others had left would see a run that has ended.
    """
    running = {member.start(): member for member in members}
    while running:
        if all(member.waits for member in running.values()):
            for to_member, member in running.items():
                member.waits = False
                with contextlib.suppress(OSError):  # it has ended meanwhile, which is noticed below
                    to_member.send("leave")
        for connection in wait(list(running)):
            assert isinstance(connection, Connection)
            member = running[connection]
            try:
                kind, *what = connection.recv()
                if kind == "waiting":
                    member.waits = True
                else:
                    reports.take(member, kind, *what)
                continue
            except (EOFError, OSError):
                connection.close()
                del running[connection]
            assert member.process is not None
            member.process.join()
            if member.done or member.error is not None:
                continue
            # A member is done only when all slides have ended.
            again = member.starts < MOST_STARTS and not any(other.done for other in members)
            how = how_it_ended(member.process.exitcode or 0)
            tell(f"the process of {member.device} {how}" + ("; it is being restarted" if again else ""))
            if again:
                running[member.start()] = member


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
            process.join(UNWOUND_AFTER_S)
            process.kill()
            process.join()
