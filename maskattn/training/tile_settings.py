"""The settings of the fine-tuning of a tile encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maskattn.slide.asked import asked

__all__ = ["TileSettings"]


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """The settings of the stage "tile" in addition to those of every training.

    Attributes:
        stage: "slide" trains a slide model on features, "tile" an encoder on patches or slides.
        patches: folder of labelled patches, with a folder for each class and masks next to the patches (NAME_mask.png).
        patient_pattern: regular expression whose first group, in a patch's name, is the patient; None: each patch is
            a patient.
        slides: a folder, a glob or a manifest of slides; each of their tiles has the label of its slide.
        spacing_um: µm per pixel of these tiles; None is the encoder's.
        patch_px: side of these tiles in pixels at that spacing; None is the encoder's.
        validation_tiles: number of evenly spaced tiles of each slide that validation reads; None reads all.
        weights: a file of the encoder's initial weights; None downloads them from its hub.
        layer_decay: factor of the learning rate from each layer of the encoder to the one below.
        drop_path: stochastic depth: the share of images that skip the last block; it rises linearly from 0.
        freeze: number of lowest blocks that are frozen; the embedding is frozen with the first.
        recompute: recompute blocks in the backward pass instead of storing their activations.
    """

    stage: Literal["slide", "tile"] = field(
        default="slide",
        metadata=asked("--stage", "slide: a model on features; tile: an encoder on --patches or --slides."),
    )
    patches: Path | None = field(
        default=None,
        metadata=asked("--patches", "Folder of patches, CLASS/NAME.png, with masks NAME_mask.png; for stage tile."),
    )
    patient_pattern: str | None = field(
        default=None,
        metadata=asked("--patient-pattern", "Regular expression: its first group in a patch's name is the patient."),
    )
    slides: Path | None = field(
        default=None,
        metadata=asked(
            "--slides", "Folder, glob or manifest of slides whose tiles have their --labels; for stage tile."
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
        metadata=asked("--validation-tiles", "Tiles per slide of --slides in validation; by default all.", minimum=1),
    )
    weights: Path | None = field(
        default=None, metadata=asked("--weights", "File of the encoder's initial weights; for stage tile.")
    )
    layer_decay: float = field(
        default=0.75,
        metadata=asked(
            "--layer-decay", "Factor of the learning rate from layer to layer down.", minimum=0.01, maximum=1
        ),
    )
    drop_path: float = field(
        default=0.1, metadata=asked("--drop-path", "Stochastic depth of the last block.", minimum=0.0, maximum=0.9)
    )
    freeze: int = field(default=0, metadata=asked("--freeze", "Number of lowest blocks that are frozen.", minimum=0))
    recompute: bool = field(
        default=False, metadata=asked("--recompute", "Recompute blocks in the backward pass, which saves memory.")
    )
