"""The processes of a training with ``--devices``: the first starts the others, waits for them and ends them.

Each process runs the complete command, with its rank in ``LOCAL_RANK``; Lightning's DDP then shares the work. If
LOCAL_RANK is already set, as by torchrun, the program that set it has started all processes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from maskattn.errors import GroupError
from maskattn.training.fit_settings import FitSettings
from maskattn.training.lightning import LightningEnvironment

__all__ = ["check_counts", "together"]

_READY = "MASKATTN_READY_FD"
_ASKED_EVERY_S = 0.2
_ENDS_WITHIN_S = 30.0


def check_counts(settings: FitSettings, judged: int) -> None:
    """Check that each process has a validation case.

    Args:
        settings: the settings of the training.
        judged: number of cases, patches or tiles that validation reads.

    Raises:
        ValueError: there are more processes than cases.
    """
    if settings.devices > judged:
        raise ValueError(
            f"each process of a training needs its own validation case, got --devices {settings.devices} and "
            f"{judged} cases; use fewer processes, or a larger --validation-share"
        )


@contextlib.contextmanager
def together(settings: FitSettings) -> Iterator[list[Any]]:
    """A context in which all processes of a training run; it yields Lightning's plugins that group them.

    Raises:
        GroupError: one of the other processes has ended.
    """
    if settings.devices == 1:
        yield []
        return
    others: _First | _Other = _Other() if "LOCAL_RANK" in os.environ else _First(settings.devices)
    try:
        others.wait()
        yield [others.environment()]
        _leave_group()
    except BaseException as error:
        lost = others.lost() if isinstance(error, RuntimeError) else None
        others.end(failed=True)
        if lost is None:
            raise
        raise GroupError(lost) from error
    others.end(failed=False)


class _First:
    """The first process, which starts, watches and ends the others.

    Args:
        processes: number of processes, including the first.
    """

    def __init__(self, processes: int) -> None:
        self._port = _free_port()
        self._started: list[tuple[subprocess.Popen[bytes], int]] = []
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port)}
        for rank in range(1, processes):
            read_end, write_end = os.pipe()
            variables = {"LOCAL_RANK": str(rank), _READY: str(write_end), **address}
            # In a separate session it gets no Ctrl-C: the first process ends it, and reports the end once.
            process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env={**os.environ, **variables},
                pass_fds=[write_end],
                start_new_session=True,
            )
            os.close(write_end)
            self._started.append((process, read_end))

    def wait(self) -> None:
        """Wait until all others are ready, which may take long, because each reads the command's inputs first."""
        waiting = dict(self._started)
        while waiting:
            for process, read_end in list(waiting.items()):
                if not select.select([read_end], [], [], _ASKED_EVERY_S)[0]:
                    continue
                if not os.read(read_end, 1):
                    _wait_for(process)
                    raise GroupError(self.lost() or "a process of the training has closed its standard files and ended")
                del waiting[process]

    def environment(self) -> Any:
        """Return Lightning's plugin for a group whose processes have been started."""
        return _Started(self._port)

    def lost(self) -> str | None:
        """Return the sentence on a process that has ended by itself; None if all are running."""
        deadline = time.monotonic() + 2.0  # a process that broke the connection may not have ended yet
        while time.monotonic() < deadline:
            for rank, (process, _) in enumerate(self._started, 1):
                code = process.poll()
                if code:
                    return _sentence(rank, len(self._started) + 1, code)
            time.sleep(_ASKED_EVERY_S / 2)
        return None

    def end(self, failed: bool) -> None:
        """Make sure that no process outlives this training; after a success they end by themselves."""
        for process, read_end in self._started:
            with contextlib.suppress(OSError):
                os.close(read_end)
            if failed or not _wait_for(process):
                process.kill()
                process.wait()


class _Other:
    """A process that the first has started."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    def wait(self) -> None:
        """Report that this process is ready."""
        ready = os.environ.pop(_READY, None)
        if ready is None:
            return
        try:
            os.write(int(ready), b".")
        except BrokenPipeError as error:
            raise GroupError("the first process of the training has ended, and this one ends too") from error
        finally:
            os.close(int(ready))

    def environment(self) -> Any:
        """Return Lightning's plugin, which reads the variables that the first process has set."""
        return LightningEnvironment()

    def lost(self) -> str | None:
        """Return the sentence on the first process if it has ended; None if it is running."""
        if os.getppid() == self._parent:
            return None
        return "the first process of the training has ended, and this one ends too; run the same command again"

    def end(self, failed: bool) -> None:
        """Do nothing, because only the first process ends others."""


class _Started(LightningEnvironment):
    """The group of the first process, which has started the others.

    Args:
        port: the port on this machine at which they connect.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning must not start processes."""
        return True

    @property
    def main_address(self) -> str:
        """The address at which the processes connect."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """The port at which the processes connect."""
        return self._port


def _sentence(rank: int, processes: int, code: int) -> str:
    if code == -signal.SIGKILL:
        how = "was killed, usually for lack of memory: use a smaller --batch-size or fewer --devices"
    elif code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}, after it printed the reason"
    return (
        f"all processes of a training must run to its end, and process {rank + 1} of {processes} {how}; finished "
        "epochs are kept, and the same command resumes from them"
    )


def _wait_for(process: subprocess.Popen[bytes]) -> bool:
    """Wait for a process for a limited time, and return whether it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDS_WITHIN_S)
        return True
    return False


def _leave_group() -> None:
    """Leave the process group, so that this process computes alone from here on."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
