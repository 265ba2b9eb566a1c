"""Names of files as people and programs meet them: as text, and as a slide's id.

A file name on Linux is bytes, and Python stands a lone surrogate for each byte that is no UTF-8. No table, terminal or
JSON reader takes those, so they are written as in a URL: ``%E4`` for the byte E4.
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
    """The name in one line that every encoding of Unicode takes; control characters and strange bytes as ``%XX``."""
    text = os.fspath(name)
    return text if text.isprintable() else "".join(map(_shown, text))


def shortened(name: str | os.PathLike[str]) -> str:
    """The name as text for a message, without its middle where it is very long."""
    text = as_text(name)
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]}…{text[-half:]}"


def id_of_file(path: str | os.PathLike[str]) -> str:
    """The id of a slide that has none of its own: its file's name without the ending; ``.ome.tif`` is one ending."""
    stem, suffix = os.path.splitext(os.path.basename(os.fspath(path)))
    if suffix.lower() in _TIFF_SUFFIXES and stem.lower().endswith(".ome") and len(stem) > len(".ome"):
        stem = stem[: -len(".ome")]
    # A control character stays: an id must not have it, and the message shows it.
    return "".join(sign if unicodedata.category(sign) == "Cc" else _shown(sign) for sign in stem)


def problem_of_id(slide_id: str) -> str | None:
    """Why an id cannot name a folder beside the summary, or None. A leading dot marks what is not finished."""
    if (
        slide_id.startswith(".")
        or any(sign in "/\\" or unicodedata.category(sign) in ("Cc", "Cs") for sign in slide_id)
        or len(slide_id.encode("utf-8", "surrogatepass")) > _MOST_ID_BYTES
    ):
        return (
            "a slide_id must name a folder (no / or \\, no control characters, no leading dot, at most "
            f"{_MOST_ID_BYTES} bytes), got {shortened(slide_id)!r}; give it another in a manifest"
        )
    if slide_id.casefold() == _SUMMARY:
        return (
            f"a slide_id must leave {_SUMMARY} to the run's own table, got {slide_id!r}; give it another in a manifest"
        )
    return None


def _shown(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":
        return f"%{ord(sign) - 0xDC00:02X}"
    if unicodedata.category(sign) in ("Cc", "Zl", "Zp"):
        return "".join(f"%{byte:02X}" for byte in sign.encode())
    return "\ufffd" if unicodedata.category(sign) == "Cs" else sign
