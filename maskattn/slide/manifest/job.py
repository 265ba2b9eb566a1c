"""A slide to run, as every source of slides hands it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SlideJob"]


@dataclass(frozen=True)
class SlideJob:
    """One slide to predict.

    Attributes:
        slide_id: names the slide's folder of outputs and its row of the summary.
        path: the slide file.
        mask_path: the user's own tissue mask; None = find the tissue.
        spacing_um: µm per level-0 pixel as the manifest has it; None = ask the file.
        problem: why this job cannot run, found while the jobs were collected; None = it can.
        carried: name and value of the manifest's other columns, for the summary.
    """

    slide_id: str
    path: Path
    mask_path: Path | None = None
    spacing_um: float | None = None
    problem: str | None = None
    carried: tuple[tuple[str, str], ...] = ()
