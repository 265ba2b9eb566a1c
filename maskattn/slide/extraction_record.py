"""The record of a slide's extracted features, JSON next to the feature file; a slide is finished if both exist."""

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
    """The identity of the encoder.

    Attributes:
        name: the encoder's name.
        sha256: the first 16 hex digits of the SHA-256 of its weights.
        width: C, the number of channels of the features.
        pooling: how its tokens are pooled.
        packed: whether it ran as a packed transformer; otherwise as its library built it.
        licence: the licence of its weights; empty if it is not known.
    """

    name: str
    sha256: str
    width: int
    pooling: str
    packed: bool
    licence: str


@dataclass(frozen=True)
class ExtractionRecord:
    """How the features of one slide were extracted.

    Attributes:
        slide_id: the slide's id.
        features: the path of the feature file, relative to the output folder.
        encoder: the identity of the encoder.
        slide: the slide as it was read.
        settings: the request with defaults filled in.
        tiles: T, the number of tiles that have features.
        cells: the number of tiles of the lattice, kept or not.
        unreadable_tiles: the number of kept tiles that could not be read; they have no features.
        kept_tokens: the number of tokens that took part, over all tiles that have features.
        tokens: the number of all tokens of these tiles.
        tissue: method, fraction and notes of the tissue mask; None if tissue was not segmented.
        notes: what the user should know about how the slide was read.
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
    """Return the path of the record of a feature file."""
    return features.with_name(features.stem + _ENDING)


def read_record(path: Path) -> ExtractionRecord | None:
    """Read a record; None if there is none, or it is incomplete."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        encoder, slide = EncoderIdentity(**fields.pop("encoder")), SlideFile(**fields.pop("slide"))
        notes = tuple(fields.pop("notes", ()))
        return ExtractionRecord(encoder=encoder, slide=slide, notes=notes, **fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class ExtractionOutcome(Outcome):
    """An outcome with the record of the slide's features.

    Attributes:
        record: the record; None if the slide failed, or another process ran it.
    """

    record: ExtractionRecord | None = None

    def row(self) -> dict[str, str]:
        """Return the outcome as a row of ``summary.csv``."""
        row = super().row()
        if self.record is not None:
            row |= {
                "encoder": self.record.encoder.name,
                "token_mask": self.record.settings["token_mask"],
                "tiles": str(self.record.tiles),
                "features": self.record.features,
            }
        return row
