"""Termination on request: SIGTERM and SIGHUP act like Ctrl-C, and the command is guaranteed to end.

Python runs a signal's handler only between its own instructions, so a decoder that does not return would block it. A
thread therefore watches: a process that has not unwound after half a minute is ended, and the next run cleans up.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Ended", "told_to_end"]

_UNWOUND_AFTER_S = 30.0
_LIKE_AN_INTERRUPT = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal other than that of Ctrl-C asked the command to end; it is in ``signal``."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.signal = signal.Signals(number)


@contextmanager
def told_to_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`Ended`; they and Ctrl-C end the process if it does not unwind."""
    if threading.current_thread() is not threading.main_thread():  # handlers can only be set in the main thread
        yield
        return
    # A signal that the caller ignores (nohup) stays ignored.
    ours = [number for number in _LIKE_AN_INTERRUPT if signal.getsignal(number) is signal.SIG_DFL]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    earlier = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_for_certain, args=(read_end,), daemon=True, name="maskattn signals")
    watch.start()
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(earlier)
        os.close(write_end)
        watch.join()
        os.close(read_end)


def _raise(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up after the first
    raise Ended(number)


def _end_for_certain(read_end: int) -> None:
    """Wait for a terminating signal, then give the command time to unwind, which closes the pipe."""
    number = 0
    while number not in (*_LIKE_AN_INTERRUPT, signal.SIGINT):
        data = os.read(read_end, 1)
        if not data:
            return
        number = data[0]
    deadline = time.monotonic() + _UNWOUND_AFTER_S
    while (left_s := deadline - time.monotonic()) > 0:
        if select.select([read_end], [], [], left_s)[0] and not os.read(read_end, 64):
            return
    os.write(2, f"maskattn: the command did not end within {_UNWOUND_AFTER_S:.0f} s and was terminated\n".encode())
    os._exit(128 + number)
