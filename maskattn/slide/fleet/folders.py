"""Work in folders that another process may remove at any time, because they are empty."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from maskattn.files import replacing

__all__ = ["in_folder", "remove_if_empty", "write_text"]

_TRIES = 1000
Made = TypeVar("Made")


def in_folder(path: Path, make: Callable[[], Made]) -> Made:
    """Call ``make``, creating the folder of ``path`` as often as it is missing, and return its result.

    Raises:
        OSError: ``make`` or creating the folder fails for another reason.
    """
    for _ in range(_TRIES):
        try:
            return make()
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # mkdir lost a race against another creation and removal
                path.parent.mkdir(parents=True, exist_ok=True)
    return make()


def write_text(path: Path, text: str) -> None:
    """Write a small file completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    in_folder(path, write)


def remove_if_empty(*folders: Path) -> None:
    """Remove those of the folders that are empty, in order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
