"""Progress of a run on stderr: a bar over slides and one over the current slide's tiles.

If stderr is not a terminal, only one line for each slide is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from maskattn.cli.bars import Bars
from maskattn.cli.streams import printable
from maskattn.slide.each_slide import OutcomeT
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import SlideOutcome, SlidePrediction

__all__ = ["ProgressBars", "lines_of_prediction", "scores_of"]


class ProgressBars(Bars, Generic[OutcomeT]):
    """Progress of :func:`maskattn.slide.each_slide.run_each`; a context manager.

    Args:
        slides: number of slides.
        lines_of: returns the lines that report a slide's outcome.
        bars_of_tiles: number of slides that are run at once.
    """

    def __init__(self, slides: int, lines_of: Callable[[OutcomeT], list[str]], bars_of_tiles: int = 1) -> None:
        self._lines_of = lines_of
        super().__init__()
        self._slides = self._progress.add_task("slides", total=slides)
        self._tiles = [self._progress.add_task("tiles", total=None) for _ in range(bars_of_tiles)]

    def slide_started(self, job: SlideJob, bar: int = 0) -> None:
        """Start a bar of tiles for a slide; a number beyond the last bar is shown nowhere."""
        if bar >= len(self._tiles):
            return
        self._progress.reset(self._tiles[bar], total=None, description=printable(f"tiles of {job.slide_id}"))

    def tiles_done(self, done: int, total: int, bar: int = 0) -> None:
        """Advance a bar of tiles."""
        if bar < len(self._tiles):
            self._progress.update(self._tiles[bar], completed=done, total=total)

    def slide_ended(self, outcome: OutcomeT) -> None:
        """Print the slide's lines and advance the bar of slides."""
        for line in self._lines_of(outcome):
            self._print(line)
        self._progress.advance(self._slides)

    def _print(self, line: str) -> None:
        self._progress.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def lines_of_prediction(outcome: SlideOutcome) -> list[str]:
    """Return the lines that report the outcome of a prediction and the notes on it."""
    if outcome.prediction is None:
        if outcome.status == "skipped":
            return []  # another process ran it and has reported it
        return [f"failed   {outcome.slide_id}: {outcome.reason}"]
    done = f"{outcome.status:<8} {outcome.slide_id}: {outcome.prediction.prediction}"
    lines = [f"{done} ({scores_of(outcome.prediction)}), {outcome.seconds:.1f} s"]
    if outcome.status == "ok":
        notes = (*outcome.prediction.tissue["notes"], *outcome.prediction.notes)
        lines += [f"note     {outcome.slide_id}: {note}" for note in notes]
    return lines


def scores_of(prediction: SlidePrediction) -> str:
    """Return the scores in one line, highest first."""
    ordered = sorted(prediction.scores.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {score:.3f}" for name, score in ordered)
