"""What a training shows while it runs: a bar over the batches of an epoch, and a line for each epoch, on stderr."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from maskattn.cli.streams import printable

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """Progress of :func:`maskattn.training.loop.fit`; a context manager. Without a terminal there are no bars.

    Args:
        epochs: how many there are at most.
    """

    def __init__(self, epochs: int) -> None:
        console = Console(file=sys.stderr)
        self._epochs = epochs
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0",
        )
        self._bar = self._progress.add_task("features", total=None)

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def looked_through(self, slide_id: str, done: int, slides: int) -> None:
        """Move the bar of files that are looked through."""
        self._progress.update(self._bar, completed=done, total=slides, description=printable(f"features of {slide_id}"))

    def batch_done(self, epoch: int, done: int, batches: int) -> None:
        """Move the epoch's bar."""
        self._progress.update(
            self._bar, completed=done, total=batches, description=f"epoch {epoch + 1} of {self._epochs}"
        )

    def epoch_done(self, row: dict[str, float], best: bool) -> None:
        """Print the epoch's line."""
        shown = [
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in row.items()
            if name not in ("epoch", "step", "lr")
        ]
        line = f"epoch {int(row['epoch']) + 1:>3}: {', '.join(shown)}{', best' if best else ''}"
        self._progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
