"""The job of one slide, as every source of slides produces it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SlideJob"]


@dataclass(frozen=True)
class SlideJob:
    """One slide to predict.

    Attributes:
        slide_id: the slide's id, which names its output folder and its row of the summary.
        path: the slide file.
        mask_path: the user's own tissue mask; None to find the tissue.
        spacing_um: µm per level-0 pixel according to the manifest; None to read it from the file.
        problem: why this job cannot run, found while the jobs were collected; None if it can.
        carried: names and values of the manifest's other columns, for the summary.
    """

    slide_id: str
    path: Path
    mask_path: Path | None = None
    spacing_um: float | None = None
    problem: str | None = None
    carried: tuple[tuple[str, str], ...] = ()
