"""Claims: a process claims a slide with a file that only one process can create.

The first claim on a slide is ``<slide_id>.1``. It is created with ``O_EXCL``, which is atomic on every file system,
even on network file systems without locks. When its owner has ended, another process may take the slide over with
``<slide_id>.2``, which again only one can create, and so on. The highest number belongs to the owner; no process
removes or changes another's file before the slide has ended, so that a file just created is never removed.

An owner that was merely suspended finds the higher number before it publishes, and discards its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import SlideError
from maskattn.slide.fleet.folders import in_folder
from maskattn.slide.fleet.members import Watch

__all__ = ["Claim", "ClaimLostError", "Claims", "owner_of", "slide_of"]


class ClaimLostError(SlideError):
    """Another process considered this one ended, and took over the slide that it was running."""


def slide_of(name: str) -> str:
    """Return the slide of a claim's file."""
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class Claim:
    """A slide that only this process may run.

    Attributes:
        folder: the folder of the claims' files.
        name: the slide's id.
        token: the owner's token.
        number: 1 for the first claim, plus one for each owner that ended while it held the slide.
        ended: the tokens of those owners, whose leftovers must be removed.
    """

    folder: Path
    name: str
    token: str
    number: int
    ended: tuple[str, ...] = ()

    def check(self) -> None:
        """Check that this process still holds the slide.

        Raises:
            ClaimLostError: another process took it over.
        """
        if self._path(self.number + 1).exists() or owner_of(self._path(self.number)) != self.token:
            raise ClaimLostError(
                f"a slide must be published by the process that holds its claim, got {self.name!r}, which another "
                "process took over because this one gave no sign of life in time; nothing is lost, and a longer "
                "--claim-timeout avoids it"
            )

    def release(self) -> None:
        """Release the slide; claims that this process does not hold are kept."""
        for number in range(1, self.number + 1):
            path = self._path(number)
            with contextlib.suppress(OSError):
                if owner_of(path) in (self.token, *self.ended):
                    path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}.{number}"


class Claims:
    """The claims of one process.

    Args:
        folder: the folder of the claims' files.
        token: the token of the process.
        watch: knows which owners have ended.
    """

    def __init__(self, folder: Path, token: str, watch: Watch) -> None:
        self._folder = folder
        self._token = token
        self._watch = watch

    def try_claim(self, name: str) -> Claim | None:
        """Claim a slide that is free, or whose owner has ended; None if another process holds it.

        Raises:
            OSError: the folder cannot be written.
        """
        ended: list[str] = []
        number = 1
        while not self._create(name, number):
            path = self._folder / f"{name}.{number}"
            owner = owner_of(path)
            if not (self._folder / f"{name}.{number + 1}").exists() and not self._has_ended(path, owner):
                return None
            ended.append(owner)
            number += 1
        claim = Claim(self._folder, name, self._token, number, tuple(filter(None, ended)))
        if (self._folder / f"{name}.{number + 1}").exists():
            # The owner of a later claim is releasing the slide, from the lowest number upwards.
            claim._path(number).unlink(missing_ok=True)
            return None
        return claim

    def claimed(self) -> set[str]:
        """Return the slides that any process has claimed."""
        try:
            return {slide_of(name) for name in os.listdir(self._folder)}
        except FileNotFoundError:
            return set()

    def _has_ended(self, path: Path, owner: str) -> bool:
        if owner:
            return self._watch.has_ended(owner)
        # The owner has not written its token yet, or ended before it could.
        return path.exists() and self._watch.is_silent(path)

    def _create(self, name: str, number: int) -> bool:
        path = self._folder / f"{name}.{number}"
        try:
            descriptor = in_folder(path, lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"token": self._token, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, file)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True


def owner_of(path: Path) -> str:
    """Return the token of a claim's owner; "" if the file does not contain it yet, or does not exist."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
