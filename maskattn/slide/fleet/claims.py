"""Claims: a file that one process alone can create says that a slide is its own.

The first claim of a slide is ``<slide_id>.1``. It is made by ``O_EXCL``, which every file system does in one step, also
those on the network, many of which have no locks. When its owner has ended, others may take the slide over: by
``<slide_id>.2``, which again only one can create, and so on. The highest number is the owner's; nobody ever removes or
changes another's file before the slide has ended, so that none can be removed that has just been made.

An owner that was only asleep finds the higher number when it is about to publish, and gives its work up.
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
    """Another process took the slide over while this one, which it took for ended, was at work on it."""


def slide_of(name: str) -> str:
    """The slide that a claim's file is of."""
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class Claim:
    """A slide that this process alone may work on.

    Attributes:
        name: the slide's id.
        token: the owner's.
        number: 1 for a first claim; one more for each owner that ended while it held the slide.
        ended: the tokens of those owners, whose leftovers are to be cleared away.
    """

    folder: Path
    name: str
    token: str
    number: int
    ended: tuple[str, ...] = ()

    def check(self) -> None:
        """Make sure that the slide is still this process's own.

        Raises:
            ClaimLostError: it is not.
        """
        if self._path(self.number + 1).exists() or owner_of(self._path(self.number)) != self.token:
            raise ClaimLostError(
                f"a slide is published by the process that holds its claim, got {self.name!r}, which another process "
                "took over since this one did not answer in time; nothing is lost, and a longer --claim-timeout "
                "avoids it"
            )

    def release(self) -> None:
        """Give the slide free; what this process does not hold any more stays."""
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
        folder: of the claims' files.
        token: the process's.
        watch: tells which owners have ended.
    """

    def __init__(self, folder: Path, token: str, watch: Watch) -> None:
        self._folder = folder
        self._token = token
        self._watch = watch

    def try_claim(self, name: str) -> Claim | None:
        """Claim a slide that is free, or whose owner has ended; None where another process has it.

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
            # Its owner is about to release it, from the lowest number up.
            claim._path(number).unlink(missing_ok=True)
            return None
        return claim

    def claimed(self) -> set[str]:
        """The slides that are claimed by anyone."""
        try:
            return {slide_of(name) for name in os.listdir(self._folder)}
        except FileNotFoundError:
            return set()

    def _has_ended(self, path: Path, owner: str) -> bool:
        if owner:
            return self._watch.has_ended(owner)
        # Its owner has not written its name yet; or ended before it could.
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
    """The token of a claim's owner; "" where the file has none yet, or is not there."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
