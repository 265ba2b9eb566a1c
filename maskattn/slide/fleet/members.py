"""The members of a fleet: each process has a file, which it touches as long as it lives.

Clocks of different machines or drives are never compared: each observer remembers when it last saw a file change, by
its own monotonic clock. If a process on the same machine ends, that is known at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskattn.slide.fleet.folders import write_text
from maskattn.slide.fleet.process import Process

__all__ = ["Member", "Watch", "forget_process", "members_of", "read_member"]

_BEATS_IN_TIMEOUT = 10


def members_of(folder: Path) -> Iterator[str]:
    """Yield the tokens of the members in a folder, living or not."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if name.endswith(".json") and not name.startswith("."):
                yield name.removesuffix(".json")


def read_member(folder: Path, token: str) -> dict[str, Any] | None:
    """Return the contents of a member's file; None if it does not exist or cannot be read."""
    try:
        found = json.loads((folder / f"{token}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def forget_process(folder: Path, host: str, pid: int) -> None:
    """Let the others take a process for ended that is known to be; where it lives after all, it tells so again.

    Args:
        folder: of the members' files.
        host: the name of its machine.
        pid: its process id there.
    """
    for token in list(members_of(folder)):
        process = (read_member(folder, token) or {}).get("process")
        if isinstance(process, dict) and (process.get("host"), process.get("pid")) == (host, pid):
            with contextlib.suppress(OSError):
                (folder / f"{token}.json").unlink(missing_ok=True)


class Member:
    """This process as a member of a fleet; also a context manager.

    Args:
        folder: the folder of the members' files.
        claim_timeout_s: seconds without a touch after which other members consider this one ended.
        about: the description that other members read.

    Attributes:
        token: a random text that identifies the member and its files.
        process: the identity of this process.
    """

    def __init__(self, folder: Path, claim_timeout_s: float, about: dict[str, Any]) -> None:
        self.token = secrets.token_hex(6)
        self.process = Process.current()
        self._path = folder / f"{self.token}.json"
        self._about = about
        self._beat_s = claim_timeout_s / _BEATS_IN_TIMEOUT
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def __enter__(self) -> Member:
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def join(self, **about: Any) -> None:
        """Write this member's file, with ``about`` added to its description, and touch it from now on."""
        self.tell(**about)
        self._thread.start()

    def leave(self) -> None:
        """Remove this member's file."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def tell(self, **about: Any) -> None:
        """Extend the description that other members read; errors of the drive are ignored, as no one waits for it."""
        self._about |= about
        with contextlib.suppress(OSError):
            write_text(self._path, json.dumps({**self._about, "process": self.process.record()}))

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                self.tell()  # another member considered this one ended, and removed its file
            except OSError:
                pass  # the drive may come back


class Watch:
    """One process's observation of which members have ended.

    Args:
        folder: the folder of the members' files.
        claim_timeout_s: seconds for which a living member's file may stay untouched.
    """

    def __init__(self, folder: Path, claim_timeout_s: float) -> None:
        self._folder = folder
        self._timeout_s = claim_timeout_s
        self._seen: dict[Path, tuple[int, float]] = {}
        self._processes: dict[str, Process] = {}

    def has_ended(self, token: str) -> bool:
        """Return whether a member has left, is known to have ended, or was silent for longer than the timeout."""
        path = self._folder / f"{token}.json"
        process = self._process(token)
        if process is not None and process.has_ended():
            return True
        return self.is_silent(path)

    def is_silent(self, path: Path) -> bool:
        """Return whether a file is missing, or was untouched for the timeout since this process first looked at it."""
        try:
            touched = path.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        now = time.monotonic()
        was, since = self._seen.setdefault(path, (touched, now))
        if was != touched:
            self._seen[path] = (touched, now)
            return False
        return now - since > self._timeout_s

    def living(self) -> list[str]:
        """Return the members that have not ended, as far as this process knows."""
        return [token for token in members_of(self._folder) if not self.has_ended(token)]

    def _process(self, token: str) -> Process | None:
        if token not in self._processes:
            with contextlib.suppress(KeyError, ValueError, TypeError):
                self._processes[token] = Process.of((read_member(self._folder, token) or {})["process"])
        return self._processes.get(token)
