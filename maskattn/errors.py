"""The package's own exceptions, and the quoting of file names in messages.

A message states the rule, then what came, then the remedy.
"""

from __future__ import annotations

import os
import shlex

__all__ = ["GroupError", "ManifestError", "OutputError", "ReadingStopped", "SlideError", "quoted"]


class SlideError(ValueError):
    """A slide, or a file that belongs to one, cannot be used."""


class ReadingStopped(SlideError):  # noqa: N818 -- named for what happened
    """Nothing more can be read from a slide: its decoder hangs, or crashes repeatedly."""


class ManifestError(ValueError):
    """The request does not describe a valid list of slides."""


class OutputError(OSError):
    """The output folder, or a file in it, cannot be written."""


class GroupError(RuntimeError):
    """A call over a process group cannot go on: its processes disagree, or one of them does not answer."""


def quoted(path: str | os.PathLike[str]) -> str:
    """Quote a path for a shell, for commands that messages propose: one word on one line, and never an option.

    Example:
        >>> print(f"maskattn tissue {quoted('my slides/a.svs')}")
        maskattn tissue 'my slides/a.svs'
    """
    text = os.fspath(path)
    if text.startswith("-"):
        text = f"./{text}"
    if text.isprintable():
        return shlex.quote(text)
    # For line ends, control characters and undecodable bytes: bash, zsh and ksh read escapes in these quotes.
    return "$'" + "".join(_escaped(character) for character in text) + "'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
