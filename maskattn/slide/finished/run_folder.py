"""A folder of outputs as a whole: which slides it has, how each ended, and where the slide's own file is now."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from maskattn.errors import SlideError
from maskattn.slide.file_checks import is_folder, problem_of_file
from maskattn.slide.names import as_text, problem_of_id, shortened
from maskattn.slide.prediction import SlidePrediction, read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.summary import read_summary

__all__ = ["FinishedRun", "FinishedSlide", "open_slide", "read_run"]


@dataclass(frozen=True)
class FinishedSlide:
    """A slide of a run, with outputs or without.

    Attributes:
        slide_id: the slide's id.
        folder: of its outputs; need not be there.
        status: of the last run: "ok", "skipped" or "failed"; "unknown" where the summary does not have the slide.
        reason: why it failed or was skipped.
        seconds: of the last run, as the summary has them.
        prediction: None where it has no outputs.
        row: all that the summary has of it; empty where it does not have the slide.
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
        """The path of its table of relevance."""
        return self.folder / "relevance.h5"


@dataclass(frozen=True)
class FinishedRun:
    """All slides of a folder of outputs.

    Attributes:
        out_dir: the folder.
        slides: in the order of the summary; those that it does not have come last, by name.
    """

    out_dir: Path
    slides: tuple[FinishedSlide, ...] = field(repr=False)

    def slide(self, slide_id: str) -> FinishedSlide:
        """The slide of an id.

        Raises:
            ValueError: there is none.
        """
        for slide in self.slides:
            if slide.slide_id == slide_id:
                return slide
        known = ", ".join(repr(slide.slide_id) for slide in self.slides[:5]) + (", …" if len(self.slides) > 5 else "")
        raise ValueError(
            f"a slide must be one of the run in {as_text(self.out_dir)}, got {shortened(slide_id)!r}; it has {known}"
        )


def read_run(out_dir: Path) -> FinishedRun:
    """The results in a folder of outputs.

    Raises:
        ValueError: the folder is not there, or holds no outputs.
        OSError: it cannot be read.
    """
    if not is_folder(out_dir):
        raise ValueError(
            f"outputs must lie in a folder, got {as_text(out_dir)}, which is none; name the --out of "
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
    """The slide's own file, with the spacing and the series that the run used.

    Args:
        slide: a slide that has a prediction.
        slides_dir: where to look for the file by its name before the path that the run recorded.
        isolated: decode in a process of its own.

    Raises:
        SlideError: the file is not there any more, cannot be read, or is of another size than the one that was run.
    """
    prediction = slide.prediction
    if prediction is None:
        raise SlideError(
            f"a slide must have outputs to be shown beside them, got none for {slide.slide_id!r}: {slide.reason}"
        )
    path = Path(prediction.slide.path)
    if slides_dir is not None and (slides_dir / path.name).is_file():
        path = slides_dir / path.name
    problem = problem_of_file(path, "slide")
    if problem is not None:
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
