"""Progress bars on stderr, which disappear when the work has ended; without a terminal there are none."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bars"]

BarsT = TypeVar("BarsT", bound="Bars")


class Bars:
    """A context manager that shows the bars of its ``_progress``.

    Args:
        hidden: show no bars, whether or not stderr is a terminal.
    """

    def __init__(self, hidden: bool = False) -> None:
        console = Console(file=sys.stderr)  # the explicit file makes rich query its encoding
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=hidden or not console.is_terminal,
        )

    def __enter__(self: BarsT) -> BarsT:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
