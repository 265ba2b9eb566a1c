"""The cache: a folder with a bounded size, which any number of processes of a machine share.

Each process has a folder of its own in it, with a copy in a numbered folder and, beside that, a file with the number of
bytes that it takes. Who is alive is known as among the processes of a run (``fleet/members.py``), and the folder of a
process that has ended is removed by the next one that looks.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import SlideError
from maskattn.slide.fleet.folders import in_folder, remove_if_empty, write_text
from maskattn.slide.fleet.members import Member, Watch
from maskattn.slide.names import as_text
from maskattn.slide.remote.ranges import MOST_HELD_BYTES
from maskattn.slide.remote.transfer import TransferStopped

__all__ = ["DEFAULT_GB", "CacheSettings", "SlideCache"]

DEFAULT_GB = 50.0
_GB = 10**9
_SILENT_S = 300.0
_OWN_FOLDER = re.compile("[0-9a-f]{12}")
_WAIT_S = 0.2


@dataclass(frozen=True)
class CacheSettings:
    """How remote slides are read, and where copies of them go.

    Attributes:
        folder: made if it is not there; None takes one in the system's folder for temporary files.
        gb: the most that all copies in it take together, in GB of 10⁹ bytes.
        copy_whole: copy every slide, also one that could be read in parts where it lies.
        series: the index of the series that is read in files with several, which decides on the reader.
    """

    folder: Path | None = None
    gb: float = DEFAULT_GB
    copy_whole: bool = False
    series: int | None = None


class SlideCache:
    """This process's part of the cache; a context manager, which leaves nothing of its own.

    Args:
        settings: where it is, and how large.

    Raises:
        SlideError: the folder cannot be used.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._limit = int(settings.gb * _GB)
        self._gb = settings.gb
        self.settings = settings
        self.folder = (settings.folder or Path(tempfile.gettempdir()) / f"maskattn-slides-{os.getuid()}").absolute()
        self._is_default = settings.folder is None
        self._member = Member(self.folder / "members", _SILENT_S, {})
        self._watch = Watch(self.folder / "members", _SILENT_S)
        self._own = self.folder / self._member.token
        self._count = 0
        self._lock = threading.Lock()

    def __enter__(self) -> SlideCache:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            foreign = self._is_default and not self._is_private()
            if not foreign:
                self._member.join()
                in_folder(self._own, lambda: self._own.mkdir(mode=0o700))
        except OSError as error:
            raise SlideError(
                f"the cache must be a folder that takes slides, got {as_text(self.folder)}: {error.strerror}; name "
                "another with --cache-dir"
            ) from error
        if foreign:
            raise SlideError(
                f"the cache must belong to this user, got {as_text(self.folder)}, which is another's; name one with "
                "--cache-dir"
            )
        self.clear_ended()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._own, ignore_errors=True)
        self._member.leave()
        remove_if_empty(self.folder / "members", *([self.folder] if self._is_default else []))

    def make_room(self, total_bytes: int | None, name: str, stop: threading.Event) -> Path:
        """Make a folder for a copy; waits until there is room for it.

        Args:
            total_bytes: the size of the copy; where it is not known, it gets the whole cache.
            name: the slide's, for messages.
            stop: ends the wait.

        Raises:
            SlideError: the copy is larger than the cache, or than what is free on the disk without other copies.
            TransferStopped: ``stop`` was set.
        """
        size = self._limit if total_bytes is None else total_bytes
        if size > self._limit:
            raise SlideError(
                f"a slide must fit into the cache, got {size / _GB:.3g} GB of {name} for a cache of {self._gb:g} GB; "
                "give more with --cache-gb"
            )
        with self._lock:
            self._count += 1
            place = self._own / str(self._count)
        note = self._note_of(place)
        while not stop.is_set():
            write_text(note, str(size))  # before the others are counted: of two that come at once, one sees the other
            taken = sum(self._sizes())
            free = shutil.disk_usage(self.folder).free
            if taken <= self._limit and (total_bytes is None or size <= free):
                place.mkdir(mode=0o700)
                return place
            note.unlink(missing_ok=True)
            if taken == size > free:
                raise SlideError(
                    f"the cache must have room on its disk, got {free / _GB:.3g} GB free in {as_text(self.folder)} for "
                    f"{size / _GB:.3g} GB of {name}; name another folder with --cache-dir"
                )
            stop.wait(_WAIT_S * (1 + random.random()))
            self.clear_ended()
        raise TransferStopped

    def room_for_parts(self) -> int:
        """Return the most that a slide takes here that is read in parts, in bytes: what its reader read at first."""
        return min(MOST_HELD_BYTES, self._limit)

    def release(self, place: Path) -> None:
        """Remove a copy."""
        shutil.rmtree(place, ignore_errors=True)
        self._note_of(place).unlink(missing_ok=True)

    def clear_ended(self) -> None:
        """Remove what processes left that have ended."""
        for folder in list(self._folders()):
            if folder != self._own and self._watch.has_ended(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
                (self.folder / "members" / f"{folder.name}.json").unlink(missing_ok=True)

    def check_size(self, copied_bytes: int, name: str) -> None:
        """Refuse a copy of unknown size that has become larger than the cache."""
        if copied_bytes > self._limit:
            raise SlideError(
                f"a slide must fit into the cache, got more than {self._gb:g} GB of {name}; give more with --cache-gb"
            )

    def _folders(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from (path for path in self.folder.iterdir() if _OWN_FOLDER.fullmatch(path.name))

    def _sizes(self) -> Iterator[int]:
        for folder in self._folders():
            for note in folder.glob("*.bytes"):
                with contextlib.suppress(OSError, ValueError):
                    yield int(note.read_text())

    def _note_of(self, place: Path) -> Path:
        return place.with_name(f"{place.name}.bytes")

    def _is_private(self) -> bool:
        return self.folder.lstat().st_uid == os.getuid()
