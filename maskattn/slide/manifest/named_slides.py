"""Find slides that a table names only by id or file name, in its own folder or in one named along with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from maskattn.slide.file_checks import is_there
from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES
from maskattn.slide.names import as_text, id_of_file, shortened

__all__ = ["NamedSlides", "id_of_features"]

_MOST_FOLDERS = 5


class NamedSlides:
    """An index of the slides in folders; a folder is listed when it is first searched.

    Args:
        folders: the folders to search, in order; the first that has a slide is taken.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(dict.fromkeys(folders))
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str, where: str) -> tuple[Path, str | None]:
        """Return the file of a slide, and why it cannot be taken, or None if it can.

        Args:
            name: the slide's id or its file's name, which may be preceded by folders.
            where: the line of the table, for the message.
        """
        for folder in self._folders:
            path = folder / name
            if path.suffix.lower() in SLIDE_SUFFIXES and is_there(path):
                return path, None
            found = self._by_id(path.parent).get(path.name, [])
            if len(found) == 1:
                return found[0], None
            if found:
                names = " and ".join(as_text(each.name) for each in found)
                return path, (
                    f"a slide's id must name one file, got {names} for {shortened(name)!r} in {where}; give the table "
                    "a column slide_path"
                )
        searched = ", ".join(map(as_text, self._folders[:_MOST_FOLDERS]))
        searched += ", ..." * (len(self._folders) > _MOST_FOLDERS)
        return self._folders[0] / name, (
            f"a slide that a table names must be in its folder or in one named along with it, got no slide "
            f"{shortened(name)!r} ({where}) in {searched}; name its folder on the command line, or give the table "
            "a column slide_path"
        )

    def _by_id(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listed:
            slides: dict[str, list[Path]] = {}
            try:
                names = sorted(os.listdir(folder))
            except (OSError, ValueError):
                names = []
            for name in names:
                if os.path.splitext(name)[1].lower() in SLIDE_SUFFIXES and not name.startswith("."):
                    slides.setdefault(id_of_file(name), []).append(folder / name)
            self._listed[folder] = slides
        return self._listed[folder]


def id_of_features(filename: str) -> str:
    """Return the slide that STAMP's FILENAME, a file of features, belongs to: the path without ``.h5``."""
    path = PurePosixPath(filename.replace("\\", "/"))
    return str(path.with_suffix("") if path.suffix.lower() in (".h5", ".hdf5") else path)
