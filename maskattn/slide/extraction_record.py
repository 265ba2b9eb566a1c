"""The record of a slide's extracted features, in JSON beside their file: a slide is finished where both are there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskattn.files import replacing
from maskattn.slide.outcome import Outcome
from maskattn.slide.prediction import SlideFile

__all__ = ["EncoderIdentity", "ExtractionOutcome", "ExtractionRecord", "read_record", "record_path"]

_ENDING = ".extraction.json"


@dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder it was.

    Attributes:
        name: the encoder's.
        sha256: the first 16 hex digits of the SHA-256 over its weights.
        width: C, of the features.
        pooling: of its tokens.
        packed: whether it ran as a packed transformer; else as its library built it.
        licence: of its weights; empty where it is not known.
    """

    name: str
    sha256: str
    width: int
    pooling: str
    packed: bool
    licence: str


@dataclass(frozen=True)
class ExtractionRecord:
    """How the features of one slide came about.

    Attributes:
        slide_id: the slide's id.
        features: their file, from the output folder.
        encoder: which encoder.
        slide: the slide as it was read.
        settings: as asked for, with what was left open filled in.
        tiles: T, the tiles that have features.
        cells: tiles of the lattice, kept or not.
        unreadable_tiles: kept tiles that could not be read; they have no features.
        kept_tokens: tokens that took part, of all tiles together.
        tokens: tokens of these tiles.
        tissue: method, fraction and notes of the tissue mask; None where none was sought.
        notes: what the user should know of how the slide was read.
        timings_s: stage → seconds.
        versions: package → version.
    """

    slide_id: str
    features: str
    encoder: EncoderIdentity
    slide: SlideFile
    settings: dict[str, Any]
    tiles: int
    cells: int
    unreadable_tiles: int
    kept_tokens: int
    tokens: int
    tissue: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    timings_s: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the record.

        Raises:
            OSError: the file cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def record_path(features: Path) -> Path:
    """Where the record of a file of features lies."""
    return features.with_name(features.stem + _ENDING)


def read_record(path: Path) -> ExtractionRecord | None:
    """Read a record back; None where there is none, or none that is complete."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        encoder, slide = EncoderIdentity(**fields.pop("encoder")), SlideFile(**fields.pop("slide"))
        notes = tuple(fields.pop("notes", ()))
        return ExtractionRecord(encoder=encoder, slide=slide, notes=notes, **fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class ExtractionOutcome(Outcome):
    """An outcome with what the run recorded of the slide.

    Attributes:
        record: None when it failed.
    """

    record: ExtractionRecord | None = None

    def row(self) -> dict[str, str]:
        """The outcome as a row of ``summary.csv``."""
        row = super().row()
        if self.record is not None:
            row |= {
                "encoder": self.record.encoder.name,
                "token_mask": self.record.settings["token_mask"],
                "tiles": str(self.record.tiles),
                "features": self.record.features,
            }
        return row
