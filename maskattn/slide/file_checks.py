"""Explain why a path cannot be read as a file; whatever the file system answers, no check raises an exception."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from maskattn.slide.names import shortened

__all__ = ["is_folder", "is_there", "may_read", "problem_of_file", "same_file"]

_WINDOWS = re.compile(r"(^|/)([A-Za-z]:[\\/]|\\\\)")


def problem_of_file(path: Path, what: str, where: str = "") -> str | None:
    """Return why the path is not a readable file, as an error message, or None if it is.

    Args:
        path: the path of a slide or a mask.
        what: "slide" or "mask", for the message.
        where: the line of the manifest that named it, for the message; empty if none did.
    """
    fault = _fault_of(path)
    if fault is None:
        return None
    cause, remedy = fault
    return f"a {what} must be a file, got {shortened(path)}{f' in {where}' if where else ''}, which {cause}; {remedy}"


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether the path is a folder, as far as this user can see."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def may_read(path: str | os.PathLike[str]) -> bool:
    """Return whether this user may read an existing file, or list an existing folder."""
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def is_there(path: Path) -> bool:
    """Return whether the path exists, even as a broken link."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file."""
    try:
        return one == other or os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError):
        return False


def _fault_of(path: Path) -> tuple[str, str] | None:
    """Return what is wrong with the path, and the remedy, or None."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return "contains a null byte, which no file name can", "correct the path"
    except OSError as error:
        return _fault_of_path(path, error)
    if stat.S_ISDIR(mode):
        return "is a folder", "name the slide file in it, or give the folder on the command line"
    if not stat.S_ISREG(mode):
        return "is a device, a pipe or a socket", "name a file on a disk"
    if not may_read(path):
        return "this user may not read", "ask its owner for permission to read it"
    return None


def _fault_of_path(path: Path, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ENAMETOOLONG:
        return f"is too long for this file system ({len(os.fsencode(path))} bytes)", "shorten its name"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "is in a folder that this user may not search", "ask its owner for permission"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself", "name the file itself"
    if error.errno == errno.ENOTDIR:
        return "passes through a file as if it were a folder", "check the path"
    if error.errno != errno.ENOENT:
        return f"cannot be reached ({error.strerror})", "check the disk or the network that holds it"
    if os.path.islink(path):
        return f"is a link to {shortened(os.readlink(path))}, which does not exist", "mount the disk that it leads to"
    if _WINDOWS.search(os.fspath(path)):
        return "does not exist", "write the Windows path as this machine mounts it"
    return "does not exist", "check the path"
