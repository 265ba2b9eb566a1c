"""Bars of progress on stderr, which are gone when what they show has ended; without a terminal there are none."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bars"]

BarsT = TypeVar("BarsT", bound="Bars")


class Bars:
    """A context manager whose ``_progress`` has the bars.

    Args:
        hidden: no bars, whatever stderr is.
    """

    def __init__(self, hidden: bool = False) -> None:
        console = Console(file=sys.stderr)  # named, so that its encoding is asked for
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
