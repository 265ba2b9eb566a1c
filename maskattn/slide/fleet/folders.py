"""Folders that another process may put away at any moment, since nothing is in them."""

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
    """What ``make`` returns when the folder of ``path`` is there for it; made again as often as it goes away.

    Raises:
        OSError: ``make`` or the folder fails for another reason.
    """
    for _ in range(_TRIES):
        try:
            return make()
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # and gone again, before it could be looked at
                path.parent.mkdir(parents=True, exist_ok=True)
    return make()


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    in_folder(path, write)


def remove_if_empty(*folders: Path) -> None:
    """Remove folders, in order, as far as nothing is in them."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
