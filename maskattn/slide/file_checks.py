"""Why a path cannot be read as a file, in words: no answer of the file system, however strange, is an exception."""

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
    """Why the path is no file that can be read, or None.

    Args:
        path: of a slide or a mask.
        what: "slide" or "mask".
        where: the line of the manifest that named it, for the message.
    """
    fault = _fault_of(path)
    if fault is None:
        return None
    cause, remedy = fault
    return f"a {what} must be a file, got {shortened(path)}{f' in {where}' if where else ''}, which {cause}; {remedy}"


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there, as far as this user can see."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def may_read(path: str | os.PathLike[str]) -> bool:
    """Whether this user may read a file, or list a folder, that is there."""
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def is_there(path: Path) -> bool:
    """Whether there is anything of this name, be it a link that leads nowhere."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return one == other or os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError):
        return False


def _fault_of(path: Path) -> tuple[str, str] | None:
    """What is wrong with the path, and the remedy."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return "holds a null byte, as no file name does", "write the path anew"
    except OSError as error:
        return _fault_of_path(path, error)
    if stat.S_ISDIR(mode):
        return "is a folder", "name the slide file in it, or the folder on the command line"
    if not stat.S_ISREG(mode):
        return "is a device, a pipe or a socket", "name a file on a disk"
    if not may_read(path):
        return "this user may not read", "ask its owner for permission to read it"
    return None


def _fault_of_path(path: Path, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ENAMETOOLONG:
        return f"is too long for a path here ({len(os.fsencode(path))} bytes)", "shorten its name"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "lies in a folder that this user may not search", "ask its owner for permission"
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself", "name the file itself"
    if error.errno == errno.ENOTDIR:
        return "has a file where a folder should be", "check the path"
    if error.errno != errno.ENOENT:
        return f"cannot be reached ({error.strerror})", "check the disk or the network that holds it"
    if os.path.islink(path):
        return f"is a link to {shortened(os.readlink(path))}, which does not exist", "mount what it leads to"
    if _WINDOWS.search(os.fspath(path)):
        return "does not exist", "write a path of Windows as this machine has it"
    return "does not exist", "check the path"
