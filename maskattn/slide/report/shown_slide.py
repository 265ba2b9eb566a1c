"""Show a slide of a finished run in a notebook."""

from __future__ import annotations

import os
from pathlib import Path

from maskattn.slide.finished import read_run
from maskattn.slide.report.markup import Markup, element
from maskattn.slide.report.page import style_sheet
from maskattn.slide.report.slide_part import slide_part

__all__ = ["ShownSlide", "show"]


class ShownSlide:
    """A slide's section of the report, which notebooks display; ``html`` is its markup."""

    def __init__(self, slide_id: str, html: Markup) -> None:
        self.slide_id, self.html = slide_id, html

    def __repr__(self) -> str:
        return f"ShownSlide({self.slide_id!r})"

    def _repr_html_(self) -> str:
        return str(self.html)


def show(
    out_dir: str | os.PathLike[str], slide_id: str, *, top: int = 4, slides_dir: str | os.PathLike[str] | None = None
) -> ShownSlide:
    """Show a slide of a finished run in a notebook: its scores, maps, and its most relevant tiles.

    Args:
        out_dir: the output folder.
        slide_id: the slide's id in ``summary.csv``.
        top: the number of tiles to show for each class, and against it.
        slides_dir: a folder to search for the slide's file by name, before the path that the run recorded is tried.

    Raises:
        ValueError: the folder or the slide does not exist.

    Example:
        >>> maskattn.slide.show("out", "case_7")  # doctest: +SKIP
    """
    slide = read_run(Path(out_dir)).slide(slide_id)
    section = slide_part(slide, top, None if slides_dir is None else Path(slides_dir))
    return ShownSlide(slide_id, element("div", style_sheet(), element("h2", slide_id), section, class_="maskattn cell"))
