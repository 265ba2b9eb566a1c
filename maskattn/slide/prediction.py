"""What a slide's run hands on: the prediction with where it came from, and the outcome that the summary records."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskattn.files import replacing
from maskattn.slide.outcome import Outcome

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["ModelIdentity", "SlideCounts", "SlideFile", "SlideOutcome", "SlidePrediction", "read_prediction"]


@dataclass(frozen=True)
class SlideFile:
    """The slide as it was read: level-0 size, and where the spacing came from (override, manifest or metadata).

    ``reader`` names the library that decoded it; predictions of earlier versions do not tell.
    """

    path: str
    bytes: int
    vendor: str | None
    width_px: int
    height_px: int
    spacing_um: float
    spacing_source: str
    objective_power: float | None
    reader: str = ""

    @classmethod
    def of(cls, path: Path, info: SlideInfo) -> SlideFile:
        """An open slide."""
        names = ("vendor", "width_px", "height_px", "spacing_um", "spacing_source", "objective_power", "reader")
        return cls(path=str(path), bytes=path.stat().st_size, **{name: getattr(info, name) for name in names})


@dataclass(frozen=True)
class ModelIdentity:
    """Which model spoke.

    Attributes:
        name: the model's.
        sha256: the first 16 hex digits of the SHA-256 over its configuration and weights.
        classes: names of its scores.
        demonstration: its classes mean nothing outside the package's own synthetic slides.
        note: a sentence of its maker's.
    """

    name: str
    sha256: str
    classes: tuple[str, ...]
    demonstration: bool
    note: str


@dataclass(frozen=True)
class SlideCounts:
    """How much of the slide was looked at. ``skipped_tokens`` are the background tokens of the whole grid."""

    cells: int
    kept_tiles: int
    kept_tokens: int
    skipped_tokens: int
    unreadable_tiles: int


@dataclass(frozen=True)
class SlidePrediction:
    """The prediction of one slide, as ``prediction.json`` keeps it.

    Attributes:
        slide_id: the slide's id.
        prediction: the class with the highest score.
        scores: class → softmax score; they sum to 1. Of regression and survival the value, or the log risk.
        logits: class → raw score.
        model: which model.
        slide: the slide as it was read.
        tissue: method, fraction and notes of the tissue mask.
        settings: how the slide was run; ``workers`` are the processes that decoded tiles, 0 = the run's own.
        counts: cells, tiles and tokens.
        timings_s: stage → seconds.
        versions: package → version.
        notes: what the user should know of how the slide was read, e.g. that tiles were left out.
        maps: class → its map: method, what it sums to, and its test (:mod:`maskattn.explain.map_check`).
    """

    slide_id: str
    prediction: str
    scores: dict[str, float]
    logits: dict[str, float]
    model: ModelIdentity
    slide: SlideFile
    tissue: dict[str, Any]
    settings: dict[str, Any]
    counts: SlideCounts
    timings_s: dict[str, float]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    maps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write ``prediction.json``.

        Raises:
            OSError: the file cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_prediction(path: Path) -> SlidePrediction:
    """Read a ``prediction.json`` back.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a complete prediction of this package.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model = ModelIdentity(**{**fields.pop("model"), "classes": tuple(fields["scores"])})
        slide = SlideFile(**fields.pop("slide"))
        counts = SlideCounts(**fields.pop("counts"))
        notes = tuple(fields.pop("notes", ()))
        return SlidePrediction(model=model, slide=slide, counts=counts, notes=notes, **fields)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a prediction.json must be complete, got {path}: {error}; run the slide again with --overwrite"
        ) from error


@dataclass(frozen=True)
class SlideOutcome(Outcome):
    """An outcome with what the run recorded of the slide.

    Attributes:
        prediction: None when it failed.
    """

    prediction: SlidePrediction | None = None

    def row(self) -> dict[str, str]:
        """The outcome as a row of ``summary.csv``."""
        row = super().row()
        if self.prediction is not None:
            row |= {"prediction": self.prediction.prediction, "model": self.prediction.model.name}
            row |= {f"score_{name}": f"{score:.6f}" for name, score in self.prediction.scores.items()}
            if check := self.prediction.maps.get(self.prediction.prediction, {}).get("map_check"):
                row["map_check"] = check
        return row
