"""The identity of a process, by which other processes on the same machine know at once that it has ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Process"]

_ENDED = "ZX"  # zombie (not yet reaped by its parent), or dead


@dataclass(frozen=True)
class Process:
    """A process on any machine.

    Attributes:
        host: the machine's name.
        boot: the kernel's boot id, which is unique, unlike a machine's name; "" if the system has none.
        namespace: the namespace of the process id, since containers have their own; "" if the system has none.
        pid: the process id.
        started: the start time in clock ticks, which distinguishes processes that reuse a pid.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Process:
        """Return the identity of this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _boot(), _namespace(), pid, _state(pid)[1])

    @classmethod
    def of(cls, record: Mapping[str, object]) -> Process:
        """Return the process of a :meth:`record`.

        Raises:
            KeyError, ValueError, TypeError: the record is not complete.
        """
        host, boot, namespace, started = (str(record[name]) for name in ("host", "boot", "namespace", "started"))
        return cls(host, boot, namespace, int(str(record["pid"])), started)

    def record(self) -> dict[str, object]:
        """Return the attributes as a dictionary, for JSON."""
        return asdict(self)

    def has_ended(self) -> bool:
        """Return whether it is known to have ended; False if it runs, or this machine cannot know."""
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
    """Return a process's state and start time from Linux; ("X", "") if it does not exist."""
    try:
        # The name, in parentheses, may contain any character.
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return after_name[0], after_name[19]
