"""The processes of a training with ``--devices``: the first starts the others, waits for them and ends them.

Each runs the whole command again and is told its rank by ``LOCAL_RANK``; Lightning's DDP then shares the work. Where
LOCAL_RANK is set to begin with, as torchrun sets it, whoever set it has started all processes.
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
    """Make sure that each process has something to judge.

    Args:
        settings: of the training.
        judged: how many cases, patches or tiles validation reads.

    Raises:
        ValueError: there are more processes.
    """
    if settings.devices > judged:
        raise ValueError(
            f"each process of a training needs a validation case of its own, got --devices {settings.devices} and "
            f"{judged} of them; take fewer processes, or a larger --validation-share"
        )


@contextlib.contextmanager
def together(settings: FitSettings) -> Iterator[list[Any]]:
    """Within, all processes of a training run; Lightning's plugins that make them one group are yielded.

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
    """What the first process knows of the others.

    Args:
        processes: how many there are, with the first.
    """

    def __init__(self, processes: int) -> None:
        self._port = _free_port()
        self._started: list[tuple[subprocess.Popen[bytes], int]] = []
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port)}
        for rank in range(1, processes):
            read_end, write_end = os.pipe()
            told = {"LOCAL_RANK": str(rank), _READY: str(write_end), **address}
            # In a session of its own it gets no Ctrl-C: the first process ends it, and tells of the end once.
            process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env={**os.environ, **told},
                pass_fds=[write_end],
                start_new_session=True,
            )
            os.close(write_end)
            self._started.append((process, read_end))

    def wait(self) -> None:
        """Wait until all others are here: what the command reads before its training may take each of them long."""
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
        """Lightning's plugin for a group whose processes have been started."""
        return _Started(self._port)

    def lost(self) -> str | None:
        """The sentence on a process that has ended by itself; None where all run."""
        deadline = time.monotonic() + 2.0  # what broke the connection is on its way out
        while time.monotonic() < deadline:
            for rank, (process, _) in enumerate(self._started, 1):
                code = process.poll()
                if code:
                    return _sentence(rank, len(self._started) + 1, code)
            time.sleep(_ASKED_EVERY_S / 2)
        return None

    def end(self, failed: bool) -> None:
        """Let no process outlive this training: after a success they end by themselves."""
        for process, read_end in self._started:
            with contextlib.suppress(OSError):
                os.close(read_end)
            if failed or not _wait_for(process):
                process.kill()
                process.wait()


class _Other:
    """What a process that was started knows of the first."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    def wait(self) -> None:
        """Say that this process is here."""
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
        """Lightning's plugin, which reads what the starter has set."""
        return LightningEnvironment()

    def lost(self) -> str | None:
        """The sentence on the first process if it has ended; None where it runs."""
        if os.getppid() == self._parent:
            return None
        return "the first process of the training has ended, and this one ends too; run the same command again"

    def end(self, failed: bool) -> None:
        """Nothing is to be ended from here."""


class _Started(LightningEnvironment):
    """The group of the first process, which has started the others.

    Args:
        port: on this machine, at which they meet.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    @property
    def creates_processes_externally(self) -> bool:
        """Whether Lightning must start none."""
        return True

    @property
    def main_address(self) -> str:
        """The address at which the processes meet."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """The port at which they meet."""
        return self._port


def _sentence(rank: int, processes: int, code: int) -> str:
    if code == -signal.SIGKILL:
        how = "was killed, most often for want of memory: take a smaller --batch-size or fewer --devices"
    elif code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}, and has said why"
    return (
        f"all processes of a training must run to its end, and process {rank + 1} of {processes} {how}; finished "
        "epochs are kept, and the same command goes on from them"
    )


def _wait_for(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended within the time that it is given."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDS_WITHIN_S)
        return True
    return False


def _leave_group() -> None:
    """What this process computes next, it computes alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
