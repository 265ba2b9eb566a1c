"""Which process it is, so that another one of the same machine can tell at once that it has ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Process"]

_ENDED = "ZX"  # killed, and not yet asked for by its parent


@dataclass(frozen=True)
class Process:
    """A process of some machine.

    Attributes:
        host: the machine's name.
        boot: the kernel's id of this start; "" where a system has none. Machines may have one name, starts have not.
        namespace: in which process ids are counted, as containers have their own; "" where a system has none.
        pid: process id.
        started: when it started, in the kernel's ticks; a pid is given again, to a process that started later.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _boot(), _namespace(), pid, _state(pid)[1])

    @classmethod
    def of(cls, record: Mapping[str, object]) -> Process:
        """The process of :meth:`record`.

        Raises:
            KeyError, ValueError, TypeError: it is no such record.
        """
        host, boot, namespace, started = (str(record[name]) for name in ("host", "boot", "namespace", "started"))
        return cls(host, boot, namespace, int(str(record["pid"])), started)

    def record(self) -> dict[str, object]:
        """The process as JSON."""
        return asdict(self)

    def has_ended(self) -> bool:
        """Whether it is known to have ended; False where it runs, and where this machine cannot know."""
        if not self.boot or (self.boot, self.namespace) != (_boot(), _namespace()):
            return False
        state, started = _state(self.pid)
        return state in _ENDED or started != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str]:
    """A process's state and start as Linux tells them; ("X", "") where there is none."""
    try:
        # The name, in parentheses, may hold anything.
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return after_name[0], after_name[19]
