"""Progress of a training on stderr: a bar over the batches of an epoch, and a line for each epoch."""

from __future__ import annotations

from maskattn.cli.bars import Bars
from maskattn.cli.reporting import tell
from maskattn.cli.streams import printable
from maskattn.training.run_folder import place_of_process
from maskattn.training.settings import TrainSettings

__all__ = ["TrainingProgress", "tell_once"]


def tell_once(settings: TrainSettings, text: str) -> None:
    """Print a line on stderr, in the first of the processes that train together."""
    if place_of_process(settings)[0] == 0:
        tell(text)


class TrainingProgress(Bars):
    """Progress of :func:`maskattn.training.loop.fit`; a context manager. Without a terminal there are no bars.

    Args:
        settings: the settings of the training; processes other than the first show nothing.
    """

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__(hidden=place_of_process(settings)[0] != 0)
        self._epochs = settings.epochs
        self._bar = self._progress.add_task("features", total=None)

    def looked_through(self, slide_id: str, done: int, slides: int) -> None:
        """Advance the bar of the files or slides that are scanned."""
        self._progress.update(self._bar, completed=done, total=slides, description=printable(f"scanning {slide_id}"))

    def batch_done(self, epoch: int, done: int, batches: int) -> None:
        """Advance the epoch's bar."""
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
