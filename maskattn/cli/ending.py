"""The end of a command's process, without taking apart what ends with the process anyway.

Python frees every module and object before it ends, and torch's libraries tear down their tables: a tenth of a second
or two after the last file is written. What has to happen at the end comes first here: threads are joined, functions of
``atexit`` called, streams flushed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["short_end"]


@contextlib.contextmanager
def short_end() -> Iterator[None]:
    """Let the process end as soon as the command has, with the command's code: nothing may follow it in its process.

    A process in which something else waits for the end, such as a measurement of coverage, ends in the usual way.
    """
    codes: list[int] = []
    if _nothing_waits():
        atexit.register(_end, codes)  # the first that is registered is the last that is called
    try:
        yield
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            codes.append(end.code or 0)
        raise


def _nothing_waits() -> bool:
    """Return whether no function was registered for the end, and nobody traces or goes on with this interpreter."""
    count = getattr(atexit, "_ncallbacks", None)
    return count is not None and count() == 0 and not (sys.flags.interactive or sys.gettrace() or sys.getprofile())


def _end(codes: list[int]) -> None:
    if not codes:
        return  # a traceback, or a signal, whose code is Python's affair
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if "ctypes" in sys.modules and os.name == "posix":  # torch imports it
        sys.modules["ctypes"].CDLL(None).fflush(None)  # what libraries have printed, such as oneDNN on request
    os._exit(codes[0] & 0xFF)
