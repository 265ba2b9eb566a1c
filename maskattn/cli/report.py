"""``maskattn report``: writes a folder of outputs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli.options import Debug, Outputs, SlidesFolder
from maskattn.cli.reporting import errors_in_one_line, say

__all__ = ["report"]


def report(
    outputs: Outputs,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; by default report.html in the folder of outputs.")
    ] = None,
    top: Annotated[
        int, typer.Option("--top", help="Number of tiles shown for each class, and against it.", min=0, max=100)
    ] = 4,
    slides: SlidesFolder = None,
    debug: Debug = False,
) -> None:
    """Write a report of a run.

    It is a single self-contained HTML file with every slide's maps and its most relevant tiles.
    """
    with errors_in_one_line(debug):
        from maskattn.slide.report import write_report

        path = write_report(outputs, out, top=top, slides_dir=slides)
    say(f"report      {path}")
