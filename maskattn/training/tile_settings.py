"""The fine-tuning of a tile encoder: on which patches or slides, and what of the encoder learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maskattn.slide.asked import asked

__all__ = ["TileSettings"]


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """What the stage "tile" is asked for beyond what every training is.

    Attributes:
        stage: "slide" trains a slide model on features, "tile" an encoder on patches or slides.
        patches: folder of labelled patches: a folder for each class, masks beside them as NAME_mask.png.
        patient_pattern: regular expression whose first group, in a patch's name, is its patient; None: each patch is
            a patient of its own.
        slides: slides whose tiles are learnt from, each with its slide's label: a folder, a glob or a manifest.
        spacing_um: µm per pixel of these tiles; None = the encoder's.
        patch_px: side of them in pixels at that spacing, as they are cut from the slide; None = the encoder's.
        validation_tiles: of a slide, evenly spread, that validation reads; None = all.
        weights: a file of the encoder's weights to begin with; None asks its hub.
        layer_decay: factor of the learning rate from each layer of the encoder to the one below.
        drop_path: stochastic depth: the share of images for which a block is left out, growing with depth to this.
        freeze: how many of the lowest blocks keep their weights, and with one or more the embedding too.
        recompute: run blocks again in the backward pass instead of keeping what they computed.
    """

    stage: Literal["slide", "tile"] = field(
        default="slide",
        metadata=asked("--stage", "slide: a model on features; tile: an encoder on --patches or --slides."),
    )
    patches: Path | None = field(
        default=None,
        metadata=asked("--patches", "Folder of patches, CLASS/NAME.png, with tissue in NAME_mask.png; of stage tile."),
    )
    patient_pattern: str | None = field(
        default=None,
        metadata=asked("--patient-pattern", "Regular expression: its first group in a patch's name is the patient."),
    )
    slides: Path | None = field(
        default=None,
        metadata=asked(
            "--slides", "Folder, glob or manifest of slides, whose tiles have their --labels; of stage tile."
        ),
    )
    spacing_um: float | None = field(
        default=None,
        metadata=asked("--spacing-um", "µm per pixel of the tiles of --slides; by default the encoder's."),
    )
    patch_px: int | None = field(
        default=None,
        metadata=asked(
            "--patch-size",
            "Side of these tiles, in px at that spacing; by default the encoder's.",
            minimum=8,
            maximum=16384,
        ),
    )
    validation_tiles: int | None = field(
        default=None,
        metadata=asked("--validation-tiles", "Of a slide of --slides, evenly spread; by default all.", minimum=1),
    )
    weights: Path | None = field(
        default=None, metadata=asked("--weights", "File of the encoder's weights to begin with; of stage tile.")
    )
    layer_decay: float = field(
        default=0.75,
        metadata=asked("--layer-decay", "Of the rate, from layer to layer down.", minimum=0.01, maximum=1),
    )
    drop_path: float = field(
        default=0.1, metadata=asked("--drop-path", "Stochastic depth, at the last block.", minimum=0.0, maximum=0.9)
    )
    freeze: int = field(default=0, metadata=asked("--freeze", "Lowest blocks that do not learn.", minimum=0))
    recompute: bool = field(
        default=False, metadata=asked("--recompute", "Compute blocks again in the backward pass: less memory.")
    )
