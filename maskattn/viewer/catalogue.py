"""The catalogue: the slides of a folder of outputs, or slides without outputs, each with a number."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskattn.errors import SlideError
from maskattn.slide.file_checks import is_folder
from maskattn.slide.finished import FinishedSlide, open_slide, read_run
from maskattn.slide.manifest import SlideJob, collect_jobs
from maskattn.slide.manifest.remote_slides import refuse_remote
from maskattn.slide.names import as_text
from maskattn.slide.reader import SlideReader

__all__ = ["Catalogue", "Entry", "read_catalogue"]


@dataclass(frozen=True)
class Entry:
    """A slide to show.

    Attributes:
        slide_id: its id.
        row: its row of the table, by column.
        finished: its outputs; None for a slide without outputs.
        job: its job; None for a slide with outputs.
    """

    slide_id: str
    row: dict[str, str]
    finished: FinishedSlide | None = None
    job: SlideJob | None = None

    @property
    def has_maps(self) -> bool:
        """Whether the slide has maps."""
        return self.finished is not None and self.finished.prediction is not None

    def open(self, slides_dir: Path | None) -> tuple[SlideReader, float | None]:
        """Open the slide's file; return a reader and the spacing in µm per level-0 pixel, None if unknown.

        Raises:
            SlideError: the file cannot be read.
        """
        if self.finished is not None:
            reader = open_slide(self.finished, slides_dir)
            return reader, reader.info.spacing_um
        assert self.job is not None
        if self.job.problem is not None:
            raise SlideError(self.job.problem)
        reader = SlideReader(self.job.path, self.job.spacing_um, "manifest", isolated=True)
        try:
            return reader, reader.info.spacing_um
        except SlideError:
            # A slide can be viewed without a known spacing.
            reader.close()
            return SlideReader(self.job.path, 1.0, isolated=True), None


@dataclass(frozen=True)
class Catalogue:
    """The slides to show.

    Attributes:
        title: title of the page.
        columns: columns of the table.
        entries: the slides; a slide's index is its number.
        slides_dir: a folder in which to look for slides' files by name.
    """

    title: str
    columns: tuple[str, ...]
    entries: tuple[Entry, ...] = field(repr=False)
    slides_dir: Path | None = None

    @property
    def first(self) -> int:
        """The number of the slide that is shown first: the first with maps, or 0."""
        return next((index for index, entry in enumerate(self.entries) if entry.has_maps), 0)

    def as_json(self) -> dict[str, Any]:
        """Return the table as a JSON object."""
        return {
            "title": self.title,
            "first": self.first,
            "columns": list(self.columns),
            "slides": [{"id": entry.slide_id, "maps": entry.has_maps, "row": entry.row} for entry in self.entries],
        }


def read_catalogue(path: Path, slides_dir: Path | None = None) -> Catalogue:
    """Read the catalogue of a path: a folder of outputs, a slide, or a folder or table of slides.

    Raises:
        ValueError: the path is none of these, or none of its slides can be opened.
    """
    if is_folder(path):
        try:
            return _of_run(path, slides_dir)
        except FileNotFoundError:
            pass
    jobs = collect_jobs([path])
    refuse_remote(jobs, "view")
    problems = [job.problem for job in jobs if job.problem is not None]
    if len(problems) == len(jobs):
        raise ValueError(problems[0])
    entries = tuple(Entry(job.slide_id, _row_of(job), job=job) for job in jobs)
    columns = dict.fromkeys(name for entry in entries for name in entry.row)
    return Catalogue(as_text(path.resolve().name), tuple(columns), entries, slides_dir)


def _of_run(path: Path, slides_dir: Path | None) -> Catalogue:
    if not (path / "summary.csv").exists() and not any(path.glob("*/prediction.json")):
        raise FileNotFoundError(path)
    run = read_run(path)
    rows = [_row_of_finished(slide) for slide in run.slides]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # Columns with long texts come last.
    columns.sort(key=lambda name: name in ("reason", "model"))
    entries = tuple(Entry(slide.slide_id, row, slide) for slide, row in zip(run.slides, rows, strict=True))
    return Catalogue(as_text(path.resolve().name), tuple(columns), entries, slides_dir)


def _row_of(job: SlideJob) -> dict[str, str]:
    row = {"slide_id": as_text(job.slide_id), "file": as_text(job.path.name)}
    row |= {as_text(name): as_text(value) for name, value in job.carried}
    return row | ({"reason": as_text(job.problem)} if job.problem else {})


def _row_of_finished(slide: FinishedSlide) -> dict[str, str]:
    row = {"slide_id": slide.slide_id, "status": slide.status, **slide.row}
    if slide.prediction is None:
        return {**row, "reason": slide.reason}
    counts = slide.prediction.counts
    tokens = max(counts.kept_tokens + counts.skipped_tokens, 1)
    return {**row, "tiles": str(counts.kept_tiles), "tokens_kept": f"{counts.kept_tokens / tokens:.4f}"}
