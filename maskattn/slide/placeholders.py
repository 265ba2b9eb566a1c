"""Placeholders: files of a slide's name and size that stand in the cache for a remote file, and hold none of its bytes.

Whatever takes a slide's path takes that of a placeholder. Only what reads the slide's bytes has to ask
:func:`is_placeholder`, and then reads them through :mod:`maskattn.slide.remote.ranges`. Beside a placeholder are a
note, which says what it stands for, and the parts that were read when the slide was first opened. Both are private,
because a URL may hold a credential.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

__all__ = ["is_placeholder", "keep_parts", "kept_parts", "make_placeholder", "note_of", "placeholders_beside"]

_PART = struct.Struct("<QQ")  # offset and size of a part, which precede it


def make_placeholder(path: Path, size: int, note: str) -> None:
    """Make a placeholder.

    Args:
        path: the file to make; its folder is there.
        size: what the placeholder seems to take, in bytes.
        note: what it stands for.

    Raises:
        OSError: it cannot be made.
    """
    with _created(_note_path(path)) as file:
        file.write(note.encode())
    with path.open("wb") as file:
        file.truncate(size)


def is_placeholder(path: Path) -> bool:
    """Return whether a path is a placeholder's."""
    return _note_path(path).is_file()


def placeholders_beside(path: Path) -> list[Path]:
    """Return a placeholder and those of the other files of its slide, which are in its folder, sorted."""
    return sorted(file for file in path.parent.iterdir() if is_placeholder(file))


def note_of(path: Path) -> str:
    """Return what a placeholder stands for.

    Raises:
        OSError: the path is not a placeholder's.
    """
    return _note_path(path).read_bytes().decode()


def keep_parts(path: Path, parts: Iterable[tuple[int, bytes]]) -> None:
    """Keep parts of the remote file beside its placeholder; those that were kept before are dropped.

    Args:
        path: the placeholder.
        parts: (offset, bytes) of each.

    Raises:
        OSError: they cannot be written.
    """
    with _created(_parts_path(path)) as file:
        for offset, data in parts:
            file.write(_PART.pack(offset, len(data)) + data)


def kept_parts(path: Path) -> dict[int, bytes]:
    """Return the parts that are kept beside a placeholder, by their offset."""
    try:
        data = _parts_path(path).read_bytes()
    except FileNotFoundError:
        return {}
    parts, at = {}, 0
    while at < len(data):
        offset, size = _PART.unpack_from(data, at)
        at += _PART.size
        parts[offset] = data[at : at + size]
        at += size
    return parts


def _created(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _note_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.remote")


def _parts_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")
