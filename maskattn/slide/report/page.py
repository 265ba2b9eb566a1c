"""Write the report as a page: a table of the run, a section for every slide, the models, and how to read the maps."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import maskattn
from maskattn.errors import OutputError
from maskattn.files import replacing
from maskattn.slide.file_checks import is_folder
from maskattn.slide.finished import FinishedRun, FinishedSlide, read_run
from maskattn.slide.names import as_text
from maskattn.slide.report.facts import model_cards, run_table
from maskattn.slide.report.markup import Markup, element, joined
from maskattn.slide.report.slide_part import slide_part

__all__ = ["page_head", "style_sheet", "write_report"]

_READING = (
    "A map shows which tokens or tiles are evidence for a class (red) or against it (blue): the signed contribution of "
    "each to the class's score. Colours follow the square root of the value; values near zero are nearly transparent.",
    "Squares on a map mark the tiles shown next to it. Positions are level-0 pixels of the slide.",
    "The map check compares the score from only the tiles that a map ranks as most relevant with the score from those "
    "that it ranks as least relevant. A map that does not pass must not be taken as evidence.",
)


def write_report(
    out_dir: Path,
    path: Path | None = None,
    *,
    top: int = 4,
    slides_dir: Path | None = None,
    on_slide: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report on an output folder as one self-contained HTML file.

    Args:
        out_dir: the output folder of :func:`maskattn.slide.run.run_slides`.
        path: the report's path, which ends in .html, or a folder; None writes ``out_dir/report.html``.
        top: the number of tiles to show for each class, and against it.
        slides_dir: a folder to search for the slides' files by name, before the paths that the run recorded are tried.
        on_slide: called with (slides done, slides to do).

    Returns:
        The path of the report.

    Raises:
        ValueError: the folder does not exist or contains no outputs, or the path does not end in .html.
        OutputError: the report cannot be written.
    """
    run = read_run(out_dir)
    path = _page_path(out_dir, path)
    anchors = {slide.slide_id: f"slide-{index}" for index, slide in enumerate(run.slides)}
    try:
        # Slides are written one at a time, because the pictures of a large run need not fit into memory.
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(_head(run))
            file.write(element("section", element("h2", "The run"), run_table(run, anchors), class_="run"))
            for index, slide in enumerate(run.slides):
                file.write(_part(slide, anchors[slide.slide_id], top, slides_dir))
                if on_slide is not None:
                    on_slide(index + 1, len(run.slides))
            file.write(_end(run))
    except OSError as error:
        raise OutputError(
            f"the report must be written completely, got {as_text(path)}: {error.strerror or error}; free space or "
            "choose another --out"
        ) from error
    return path


def _page_path(out_dir: Path, path: Path | None) -> Path:
    path = out_dir if path is None else path
    if is_folder(path):
        path = path / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a report's file name must end in .html, got {as_text(path)}; choose another --out")
    return path


def style_sheet() -> Markup:
    """Return the report's style sheet, which affects only elements within the class ``maskattn``."""
    text = importlib.resources.files("maskattn.slide.report").joinpath("style.css").read_text(encoding="utf-8")
    return Markup(f"<style>\n{text}</style>")


def _head(run: FinishedRun) -> str:
    title = f"maskattn: {run.out_dir.resolve().name}"
    predicted = sum(slide.prediction is not None for slide in run.slides)
    failed = sum(slide.status == "failed" for slide in run.slides)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    lines = f"{predicted} of {len(run.slides)} slides have outputs, {failed} failed. Written {now} by maskattn "
    return page_head(title, f"{lines}{maskattn.__version__}.")


def page_head(title: str, lines: str) -> str:
    """Return the beginning of a page, up to its first section: metadata, style, title and a line below the title."""
    metas = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
    ]
    head = element("head", *metas, element("title", as_text(title)), style_sheet())
    header = element("header", element("h1", title), element("p", lines))
    return f'<!DOCTYPE html>\n<html lang="en">{head}<body class="maskattn"><main>{header}'


def _end(run: FinishedRun) -> Markup:
    reading = element("ul", *(element("li", line) for line in _READING))
    return joined(
        [
            element("section", element("h2", "Model card"), model_cards(run)),
            element("section", element("h2", "How to read the maps"), reading),
            Markup("</main></body></html>\n"),
        ]
    )


# A second defence: even markup that was not escaped could not load or run anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _part(slide: FinishedSlide, anchor: str, top: int, slides_dir: Path | None) -> Markup:
    return joined(
        [
            element(
                "section",
                element("h2", slide.slide_id),
                slide_part(slide, top, slides_dir),
                id=anchor,
                class_="slide",
            ),
            Markup("\n"),
        ]
    )
