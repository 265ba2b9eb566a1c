"""Steps that a signal must not break off halfway, because a file would be left without its owner.

Python runs a signal's handler between any two instructions of the main thread, and Ctrl-C's raises an exception there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["uninterrupted"]

_ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal that arrives within the context take effect at its end.

    In a thread other than the main one, where no handler runs, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, Any]] = []

    def later(number: int, frame: Any) -> None:
        arrived.append((number, frame))

    handlers = {number: handler for number in _ENDING if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, later)
        yield
    finally:
        _put_back(handlers, later)
        if arrived:  # of several, the first ends the process
            number, frame = arrived[0]
            handlers[number](number, frame)


def _put_back(handlers: dict[Any, Any], later: Callable[[int, Any], None]) -> None:
    """Restore the handlers, all of them even if a signal arrives after the first."""
    try:
        for number, handler in handlers.items():
            if signal.getsignal(number) is later:
                signal.signal(number, handler)
    except BaseException:
        _put_back(handlers, later)
        raise
