"""Whether a slide stays the same file while it runs: a mixture of two slides, or half of one, must not be published."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import SlideError
from maskattn.slide.names import as_text
from maskattn.slide.placeholders import is_placeholder, placeholders_beside

__all__ = ["FileState", "files_of"]


@dataclass(frozen=True)
class FileState:
    """The sizes and times of a slide's files when it was opened.

    Attributes:
        path: the slide.
        files: (file, size in bytes, time of the last change in ns, or a remote file's version) of each.
    """

    path: Path
    files: tuple[tuple[str, int, int | str], ...]

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the present state of a slide.

        Raises:
            OSError: a file cannot be reached.
            StoreError: a remote file that is read in parts cannot be looked up, or has changed since it was.
        """
        if is_placeholder(path):
            from maskattn.slide.remote.ranges import present_state

            return cls(path, tuple((file.name, *present_state(file)) for file in placeholders_beside(path)))
        # The folder of another slide's name may be anything, such as its outputs.
        files = files_of(path) if path.suffix.lower() == ".mrxs" else [path]
        found = [(file, file.stat()) for file in files if file.is_file()]
        return cls(path, tuple((file.name, state.st_size, state.st_mtime_ns) for file, state in found))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Check at the end of the context that the slide is as it was, and after any error, of which that is the cause.

        Raises:
            SlideError: as for :meth:`check`.
        """
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()

    def check(self) -> None:
        """Check that the slide is as it was.

        Raises:
            SlideError: a file was replaced, removed or written to.
        """
        try:
            now = FileState.of(self.path).files
        except OSError as error:
            what = f"cannot be reached any more ({error.strerror or error})"
        else:
            if now == self.files:
                return
            changed = min({name for name, *_ in {*now} ^ {*self.files}})
            what = "was replaced, removed or written to" + (
                "" if changed == self.path.name else f" ({changed} in its folder)"
            )
        raise SlideError(
            f"a slide must stay as it is while it runs, got {as_text(self.path)}, which {what}; nothing of "
            "this run is kept, so run it again when the file is complete"
        )


def files_of(path: Path) -> list[Path]:
    """Return a slide's file and those in the folder of its name, in which MIRAX stores pixels; none that is missing."""
    folder = path.with_suffix("") if path.suffix else path
    files = [path] if path.is_file() else []
    if folder.is_dir():
        files += [Path(entry.path) for entry in os.scandir(folder) if entry.is_file()]
    return sorted(files)
