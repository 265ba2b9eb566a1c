"""Find the remedy for a decoder's error: copy missing files, convert unsupported ones, replace damaged ones."""

from __future__ import annotations

from maskattn.slide.names import as_text

__all__ = ["CONVERT", "remedy_for", "said_by"]

CONVERT = (
    "convert it to a tiled pyramid of 8-bit RGB, e.g. `vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg`"
)
_DAMAGED = "the file is damaged there: copy it again, or rescan the slide"

# Phrases in the messages of OpenSlide, libtiff and imagecodecs.
_MISSING = ("couldn't open", "can't open", "no such file", "could not open", "failed to open")
_UNSUPPORTED = (
    "can not handle images with",
    "sorry, ",
    "unsupported",
    "not supported",
    "not implemented",
    "can not handle format",
    "requires the 'imagecodecs'",
)
_TRANSIENT = ("input/output error", "stale file handle", "connection", "permission denied", "too many open files")


def said_by(error: BaseException | str) -> str:
    """Return a decoder's message in one line, with unprintable characters as ``%XX``."""
    return as_text(" ".join(str(error).split()))


def remedy_for(reason: str) -> str:
    """Return the remedy for an error message of a decoder."""
    message = reason.lower()
    if any(phrase in message for phrase in _TRANSIENT):
        return "check the disk or the network drive, and who may read the file"
    if any(phrase in message for phrase in _MISSING):
        return "a file of the slide is missing: copy the slide again with all its files and folders"
    if any(phrase in message for phrase in _UNSUPPORTED):
        return f"the file is not damaged, but this kind of image is not read: {CONVERT}"
    return _DAMAGED
