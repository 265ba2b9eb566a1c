"""File names as printable text, and as slides' ids.

A file name on Linux is a sequence of bytes, and Python represents each byte that is not valid UTF-8 by a lone
surrogate. Tables, terminals and JSON readers reject surrogates, so they are written as in a URL: ``%E4`` for byte E4.
"""

from __future__ import annotations

import os
import unicodedata

__all__ = ["as_text", "id_of_file", "problem_of_id", "shortened"]

_SUMMARY = "summary.csv"
_MOST_ID_BYTES = 200
_MOST_SHOWN = 300
_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf2", ".tf8")


def as_text(name: str | os.PathLike[str]) -> str:
    """Return the name as one line of valid Unicode, with control characters and undecodable bytes as ``%XX``."""
    text = os.fspath(name)
    return text if text.isprintable() else "".join(map(_shown, text))


def shortened(name: str | os.PathLike[str]) -> str:
    """Return the name as text for a message; the middle of a very long name is left out."""
    text = as_text(name)
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]}…{text[-half:]}"


def id_of_file(path: str | os.PathLike[str]) -> str:
    """Return the id of a slide that is given none: its file name without the suffix; ``.ome.tif`` is one suffix."""
    stem, suffix = os.path.splitext(os.path.basename(os.fspath(path)))
    if suffix.lower() in _TIFF_SUFFIXES and stem.lower().endswith(".ome") and len(stem) > len(".ome"):
        stem = stem[: -len(".ome")]
    # Control characters are kept, so that problem_of_id refuses the id and its message shows them.
    return "".join(char if unicodedata.category(char) == "Cc" else _shown(char) for char in stem)


def problem_of_id(slide_id: str) -> str | None:
    """Return why an id cannot name a folder next to the summary, or None; a leading dot marks unfinished folders."""
    if (
        slide_id.startswith(".")
        or any(char in "/\\" or unicodedata.category(char) in ("Cc", "Cs") for char in slide_id)
        or len(slide_id.encode("utf-8", "surrogatepass")) > _MOST_ID_BYTES
    ):
        return (
            "a slide_id must name a folder (no / or \\, no control characters, no leading dot, at most "
            f"{_MOST_ID_BYTES} bytes), got {shortened(slide_id)!r}; give it another in a manifest"
        )
    if slide_id.casefold() == _SUMMARY:
        return (
            f"a slide_id must not be {_SUMMARY}, the name of the run's table, got {slide_id!r}; give it another in a "
            "manifest"
        )
    return None


def _shown(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"%{ord(char) - 0xDC00:02X}"
    if unicodedata.category(char) in ("Cc", "Zl", "Zp"):
        return "".join(f"%{byte:02X}" for byte in char.encode())
    return "\ufffd" if unicodedata.category(char) == "Cs" else char
