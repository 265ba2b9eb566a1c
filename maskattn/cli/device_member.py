"""The process of one device: it runs slides, and reports to the command that started it.

It loads the model there; a process on the CPU that the command forked has the command's, in the same memory.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

from maskattn.cli.signals import Ended, told_to_end
from maskattn.slide.each_slide import OutcomeT, RunProgress

if TYPE_CHECKING:
    from pathlib import Path

    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.outcome import Outcome
    from maskattn.slide.shared_requests import SharedSettings

__all__ = ["ENDING_SIGNALS", "Run", "Work", "run_forked", "run_member"]

Run = Callable[[RunProgress[OutcomeT], Any], list[OutcomeT]]
"""Runs the slides with a loaded model; takes the progress to report, and the settings."""

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Work(Protocol[OutcomeT]):
    """The work of a command on a device; a dataclass that can be pickled."""

    @property
    def jobs(self) -> list[SlideJob]:
        """All slides."""

    @property
    def settings(self) -> SharedSettings:
        """The request."""

    @property
    def out_dir(self) -> Path:
        """The output folder, with the files of the fleet."""

    @property
    def process_gib(self) -> float | None:
        """Memory of each process in GiB if many slides are better shared by several; None if one should run them."""

    def under(self, settings: Any) -> Work[OutcomeT]:
        """Return the same work with other settings."""

    def on(self, device: str, *, alone: bool = False) -> tuple[str, Run[OutcomeT]]:
        """Load the model on a device; return a note on it ("" for none), and the function that runs the slides.

        Args:
            device: the device.
            alone: whether no other process of this command runs slides, so that the first can be opened meanwhile.
        """


def run_member(reports: Connection, device: str, cores: tuple[int, ...], together: bool = False) -> None:
    """Run slides in this process, which was started for this purpose.

    Args:
        reports: the connection that receives the :class:`Work` and sends a tuple (kind, ...) for each event.
        device: the device on which the model is loaded.
        cores: the cores that this process and its decoding workers may use; () leaves the choice to the system.
        together: whether to wait, when no slide is left, for a word through ``reports``, which the command sends when
            its other processes wait too.
    """
    with _reported(reports, cores):
        _keep_threads_within(len(cores))
        work: Work[Outcome] = reports.recv()  # unpickling imports modules that count the cores
        note, run = work.on(device)
        if note:
            reports.send(("note", note))
        run((_ReporterThatWaits if together else _Reporter)(reports), work.settings)


def run_forked(
    reports: Connection, commands: Connection, cores: tuple[int, ...], threads: int, run: Run[Any], settings: Any
) -> None:
    """Run slides in this process, a fork of the command, which has loaded the model and runs no torch threads.

    Args:
        reports: the connection that sends the reports and receives the word to leave.
        commands: the command's end of that connection, of which the fork made a copy.
        cores: as for :func:`run_member`.
        threads: the number of torch's threads without ``cores``.
        run: what ``Work.on`` returned to the command.
        settings: the settings of this process.
    """
    commands.close()
    _forget_the_command()
    with _reported(reports, cores):
        _use_threads(threads if not cores else min(threads, len(cores)))
        run(_ReporterThatWaits(reports), settings)


def _forget_the_command() -> None:
    """Let go of what the fork shares with the command: its streams, log lines, and ways to end by a signal."""
    woken = signal.set_wakeup_fd(-1)  # a signal to this process must not look like one to the command
    if woken >= 0:
        os.close(woken)
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    # The progress bars' streams have a lock, which a thread of the command may hold.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    logging.getLogger("maskattn").handlers.clear()


@contextmanager
def _reported(reports: Connection, cores: tuple[int, ...]) -> Iterator[None]:
    """Report how the context ends, and end with the command or by a signal to it."""
    threading.Thread(target=_end_with_parent, daemon=True, name="maskattn parent").start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the command, which passes it on
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        with told_to_end():
            logging.getLogger("maskattn").addHandler(_AsNotes(reports))
            yield
            reports.send(("done",))
    except Ended as end:
        raise SystemExit(128 + end.signal) from None
    except Exception as error:
        reports.send(("error", _sendable(error)))
        raise SystemExit(1) from None


def _keep_threads_within(cores: int) -> None:
    import torch

    if cores:
        torch.set_num_threads(min(torch.get_num_threads(), cores))


def _use_threads(threads: int) -> None:
    import torch

    from maskattn.extension import extension, has_extension

    torch.set_num_threads(threads)
    if has_extension():
        extension.cache_clear()  # a fork forgets that its kernels run on torch's threads
        extension()


class _Reporter:
    """Sends the progress of a run to the command."""

    def __init__(self, reports: Connection) -> None:
        self._reports = reports

    def slide_started(self, job: SlideJob) -> None:
        self._reports.send(("started", job))

    def tiles_done(self, done: int, total: int) -> None:
        self._reports.send(("tiles", done, total))

    def slide_ended(self, outcome: Outcome) -> None:
        self._reports.send(("ended", outcome))


class _ReporterThatWaits(_Reporter):
    """Leaves the run together with the command's other processes."""

    def no_slide_left(self) -> None:
        """Wait until none of the command's processes has a slide left, or has yet to join."""
        self._reports.send(("waiting",))
        self._reports.recv()


class _AsNotes(logging.Handler):
    """Sends the package's own warnings to the command."""

    def __init__(self, reports: Connection) -> None:
        super().__init__(logging.WARNING)
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        self._reports.send(("note", " ".join(record.getMessage().split())))


def _sendable(error: Exception) -> Exception:
    """Return the error, or a ``RuntimeError`` with its message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """End together with the command, even if that is killed, so that the slide's claim is free immediately."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
