"""Read a run's output folder: its slides, how each of them ended, and the slide file that each was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from maskattn.errors import SlideError
from maskattn.slide.file_checks import is_folder, problem_of_file
from maskattn.slide.names import as_text, problem_of_id, shortened
from maskattn.slide.prediction import SlidePrediction, read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.remote import is_url, path_of_url
from maskattn.slide.summary import read_summary

__all__ = ["FinishedRun", "FinishedSlide", "open_slide", "read_run"]


@dataclass(frozen=True)
class FinishedSlide:
    """A slide of a run, with outputs or without.

    Attributes:
        slide_id: the slide's id.
        folder: the folder of its outputs, which need not exist.
        status: how it ended in the last run: "ok", "skipped" or "failed"; "unknown" if the summary has no row of it.
        reason: why it failed or was skipped.
        seconds: duration in the last run, as the summary writes it.
        prediction: its prediction; None if it has no outputs.
        row: its row of the summary; empty if there is none.
    """

    slide_id: str
    folder: Path
    status: str
    reason: str = ""
    seconds: str = ""
    prediction: SlidePrediction | None = None
    row: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def maps_path(self) -> Path:
        """The path of its ``relevance.h5``."""
        return self.folder / "relevance.h5"


@dataclass(frozen=True)
class FinishedRun:
    """All slides of an output folder.

    Attributes:
        out_dir: the folder.
        slides: the slides in the order of the summary, then those without a row, sorted by id.
    """

    out_dir: Path
    slides: tuple[FinishedSlide, ...] = field(repr=False)

    def slide(self, slide_id: str) -> FinishedSlide:
        """Return the slide with an id.

        Raises:
            ValueError: the run has no such slide.
        """
        for slide in self.slides:
            if slide.slide_id == slide_id:
                return slide
        known = ", ".join(repr(slide.slide_id) for slide in self.slides[:5]) + (", …" if len(self.slides) > 5 else "")
        raise ValueError(
            f"a slide must be one of the run in {as_text(self.out_dir)}, got {shortened(slide_id)!r}; it has {known}"
        )


def read_run(out_dir: Path) -> FinishedRun:
    """Read the results in an output folder.

    Raises:
        ValueError: the folder does not exist, or holds no outputs.
        OSError: the folder cannot be read.
    """
    if not is_folder(out_dir):
        raise ValueError(
            f"outputs must be in a folder, got {as_text(out_dir)}, which is not a folder; name the --out of "
            "`maskattn infer` or `maskattn demo`"
        )
    rows = read_summary(out_dir / "summary.csv")
    ids = [slide_id for slide_id in rows if problem_of_id(slide_id) is None]
    ids += sorted(
        entry.name
        for entry in out_dir.iterdir()
        if entry.name not in rows and problem_of_id(entry.name) is None and (entry / "prediction.json").is_file()
    )
    if not ids:
        raise ValueError(
            f"a folder of outputs must hold a summary.csv or slides' folders, got neither in {as_text(out_dir)}; name "
            "the --out of `maskattn infer` or `maskattn demo`"
        )
    return FinishedRun(out_dir, tuple(_slide(out_dir / slide_id, rows.get(slide_id)) for slide_id in ids))


def _slide(folder: Path, row: dict[str, str] | None) -> FinishedSlide:
    row = row or {}
    status, reason, prediction = row.get("status", "unknown"), row.get("reason", ""), None
    try:
        prediction = read_prediction(folder / "prediction.json")
    except FileNotFoundError:
        reason = reason or "it has no outputs"
    except (OSError, ValueError) as error:
        reason = reason or str(error)
    return FinishedSlide(folder.name, folder, status, reason, row.get("seconds", ""), prediction, row)


def open_slide(slide: FinishedSlide, slides_dir: Path | None = None, *, isolated: bool = True) -> SlideReader:
    """Open the slide file of a finished slide, with the spacing and the series that the run used.

    Args:
        slide: a slide that has a prediction.
        slides_dir: a folder to search for the file's name before the path that the run recorded is tried.
        isolated: decode in a separate process.

    Raises:
        SlideError: the slide has no prediction, or its file is missing, cannot be read, or differs in size from the
            one that was run.
    """
    prediction = slide.prediction
    if prediction is None:
        raise SlideError(
            f"a slide must have outputs to be shown with them, got none for {slide.slide_id!r}: {slide.reason}"
        )
    path = Path(prediction.slide.path)
    if is_url(prediction.slide.path):
        path = path_of_url(prediction.slide.path)
    if slides_dir is not None and (slides_dir / path.name).is_file():
        path = slides_dir / path.name
    problem = problem_of_file(path, "slide")
    if problem is not None:
        if is_url(prediction.slide.path):
            problem = f"a slide must be on a disk to be shown, got {prediction.slide.path}; copy it"
        raise SlideError(f"{problem}, or say with --slides where it is now")
    reader = SlideReader(path, prediction.slide.spacing_um, series=prediction.settings.get("series"), isolated=isolated)
    found, recorded = (
        (reader.info.width_px, reader.info.height_px),
        (prediction.slide.width_px, prediction.slide.height_px),
    )
    if found != recorded:
        reader.close()
        raise SlideError(
            f"a slide must be the one that was run, got {found[0]} × {found[1]} px in {as_text(path)} and "
            f"{recorded[0]} × {recorded[1]} px in its outputs; run it again with --overwrite"
        )
    return reader
