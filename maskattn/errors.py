"""The exceptions that callers meet besides ``ValueError`` and ``TypeError``: the rule, what came, the remedy."""

from __future__ import annotations

__all__ = ["ManifestError", "OutputError", "SlideError"]


class SlideError(ValueError):
    """A slide, or a file that belongs to one, cannot be used."""


class ManifestError(ValueError):
    """What was asked for is no list of slides."""


class OutputError(OSError):
    """The output folder, or a file in it, cannot be written."""
