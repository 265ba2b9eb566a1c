"""The prediction of a slide with its provenance, and the outcome of a run with a prediction."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskattn.files import replacing
from maskattn.slide.outcome import Outcome
from maskattn.slide.remote import locate

if TYPE_CHECKING:
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.reader import SlideInfo

__all__ = [
    "EqualParts",
    "ModelIdentity",
    "SlideCounts",
    "SlideFile",
    "SlideOutcome",
    "SlidePrediction",
    "read_prediction",
]


@dataclass(frozen=True)
class SlideFile:
    """The slide as it was read: its file, level-0 size, spacing, and the source of the spacing.

    Attributes:
        path: the file, or the URL of a remote slide without credentials.
        bytes: the size of the file.
        vendor: the scanner's vendor, if the metadata state it.
        width_px: width at level 0.
        height_px: height at level 0.
        spacing_um: µm per level-0 pixel.
        spacing_source: "override", "manifest", "metadata", or "features" if only features were given.
        objective_power: magnification of the objective, if the metadata state it.
        reader: the library that decoded the slide; empty in predictions of earlier versions.
        etag: the version of a remote slide; empty if the slide was on a disk.
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
    etag: str = ""

    @classmethod
    def of(cls, job: SlideJob, info: SlideInfo) -> SlideFile:
        """Return the description of an open slide."""
        names = ("vendor", "width_px", "height_px", "spacing_um", "spacing_source", "objective_power", "reader")
        facts = {name: getattr(info, name) for name in names}
        return cls(path=job.where, bytes=job.path.stat().st_size, etag=job.etag, **facts)

    def identity(self, job: SlideJob) -> list[tuple[str, object, object]]:
        """Return what identifies the slide: (name, its value here, its value in the job)."""
        # A store that does not tell a slide's size need not have told it when the slide was run.
        size = self.bytes if job.bytes is None else job.bytes
        return [
            ("slide file", locate(self.path)[0].name, job.path.name),
            ("slide size in bytes", self.bytes, size),
            ("slide ETag", self.etag, job.etag),
        ]


@dataclass(frozen=True)
class ModelIdentity:
    """The identity of the model.

    Attributes:
        name: the model's name.
        sha256: the first 16 hex digits of the SHA-256 of its configuration and weights.
        classes: the names of its scores.
        demonstration: whether its classes are meaningless outside the package's synthetic slides.
        note: a sentence from the model's configuration.
    """

    name: str
    sha256: str
    classes: tuple[str, ...]
    demonstration: bool
    note: str


@dataclass(frozen=True)
class SlideCounts:
    """How much of the slide was processed.

    Attributes:
        cells: tiles of the grid, kept or not.
        kept_tiles: tiles that have a kept token.
        kept_tokens: tokens that took part.
        skipped_tokens: background tokens of the whole grid.
        unreadable_tiles: kept tiles that could not be read.
    """

    cells: int
    kept_tiles: int
    kept_tokens: int
    skipped_tokens: int
    unreadable_tiles: int


@dataclass(frozen=True)
class SlidePrediction:
    """The prediction of one slide, as ``prediction.json`` stores it.

    Attributes:
        slide_id: the slide's id.
        prediction: the class with the highest score.
        scores: class → softmax score, which sum to 1; for regression the value, for survival the log risk.
        logits: class → raw score.
        model: the identity of the model.
        slide: the slide as it was read.
        tissue: method, fraction and notes of the tissue mask.
        settings: how the slide was run; ``workers`` counts the processes that decoded tiles, 0 = only the run's own.
        counts: cells, tiles and tokens.
        timings_s: stage → seconds.
        versions: package → version.
        notes: what the user should know about how the slide was read, for example that tiles were left out.
        maps: class → a description of its map: method, sums, and test (:mod:`maskattn.explain.map_check`).
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
    """Read a ``prediction.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a complete prediction of this package.
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


class EqualParts:
    """Shares what is equal in the predictions of a run, so that memory does not grow with it for every slide."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def shared(self, prediction: SlidePrediction) -> SlidePrediction:
        """Return an equal prediction whose equal parts are those of earlier ones."""
        parts = {name: getattr(prediction, name) for name in ("model", "settings", "versions", "notes")}
        return replace(
            prediction, **{name: self._seen.setdefault(f"{name} {value!r}", value) for name, value in parts.items()}
        )


@dataclass(frozen=True)
class SlideOutcome(Outcome):
    """An outcome with the slide's prediction.

    Attributes:
        prediction: the prediction; None if the slide failed, or another process ran it.
    """

    prediction: SlidePrediction | None = None

    def row(self) -> dict[str, str]:
        """Return the outcome as a row of ``summary.csv``."""
        row = super().row()
        if self.prediction is not None:
            row |= {"prediction": self.prediction.prediction, "model": self.prediction.model.name}
            row |= {f"score_{name}": f"{score:.6f}" for name, score in self.prediction.scores.items()}
            if check := self.prediction.maps.get(self.prediction.prediction, {}).get("map_check"):
                row["map_check"] = check
        return row
