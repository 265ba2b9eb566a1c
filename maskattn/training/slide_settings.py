"""The settings of a training's data, task and slide model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maskattn.slide.asked import asked

__all__ = ["SlideSettings"]

_TASKS = ("binary", "multiclass", "ordinal", "regression", "survival")
_MODELS = ("vit", "mean", "max", "abmil", "clam", "transmil", "hipt")


@dataclass(frozen=True, kw_only=True)
class SlideSettings:
    """The training of a slide model on features of tiles.

    Attributes:
        features: folder of features of the slides' tiles, in any supported layout.
        labels: the table of labels, with a row for each slide, or for each patient if there is a ``slide_table``.
        out: folder of the run; created if it does not exist.
        task: the kind of prediction.
        target: the target's column in the labels; for survival a name for the outputs.
        model: name of the slide model.
        classes: the classes in order; None takes those of the labels, sorted.
        time: column of the time to the event, for survival.
        event: column of the event (1 observed, 0 censored), for survival.
        slide_table: table of each patient's slides (STAMP's slide table), if the labels have only patients.
        fusion: "early" joins the tiles of a patient's slides in one bag, "late" averages the slides' scores, and with
            "none" each slide has its own label and prediction.
        validation_share: share of the patients for validation, which chooses the epoch and fits the temperature.
        split: a table of the patients' parts, in place of ``validation_share``.
        skip_missing: leave out slides that lack features or a label, instead of ending.
        encoder: name of the features' encoder, if the files do not record it or have features of several; with
            stage "tile", the encoder that is fine-tuned.
        token_mask: token mask of the features, if the files do not record it; with stage "tile", that of the training.
        width: width of the model's layers; None is the model's default.
        depth: number of a transformer's layers.
        heads: number of its attention heads; None is one per 64 channels.
        positions: position embedding of the vision transformer.
        dropout: dropout in the model's layers.
        tiles_per_slide: number of a slide's tiles that training samples in each epoch; None reads all, as validation
            does, or 32 of slides with stage "tile".
        drop_tokens: share of the sampled tiles, or with stage "tile" of the tokens, that is dropped at random.
        instance_weight: share of CLAM's clustering loss.
        instances: number of tiles of highest, and of lowest, attention in that loss.
        impl: attention implementation; None takes the best.
    """

    features: Path | None = field(
        default=None,
        metadata=asked("--features", "Folder of features of TRIDENT, CLAM, STAMP, slide2vec, AtlasPatch or extract."),
    )
    labels: Path | None = field(
        default=None, metadata=asked("--labels", "Table of labels: slide_id[,patient_id] and the target's column.")
    )
    out: Path | None = field(
        default=None, metadata=asked("--out", "Folder of the run; created if it does not exist.", recorded=False)
    )
    task: Literal["binary", "multiclass", "ordinal", "regression", "survival"] | None = field(
        default=None, metadata=asked("--task", f"Kind of prediction: {', '.join(_TASKS)}.")
    )
    target: str | None = field(default=None, metadata=asked("--target", "The target's column in the labels."))
    model: Literal["vit", "mean", "max", "abmil", "clam", "transmil", "hipt"] = field(
        default="vit", metadata=asked("--model", f"Slide model: {', '.join(_MODELS)}.")
    )
    classes: tuple[str, ...] | None = field(
        default=None,
        metadata=asked("--class", "A class; repeat it for each, in order. By default those of the labels."),
    )
    time: str | None = field(default=None, metadata=asked("--time", "Column of the time to the event, for survival."))
    event: str | None = field(
        default=None, metadata=asked("--event", "Column of the event: 1 observed, 0 censored; for survival.")
    )
    slide_table: Path | None = field(
        default=None, metadata=asked("--slide-table", "Table of each patient's slides, if --labels has only patients.")
    )
    fusion: Literal["early", "late", "none"] = field(
        default="early",
        metadata=asked(
            "--fusion", "Slides of a patient: early joins tiles, late averages scores, none treats each separately."
        ),
    )
    validation_share: float = field(
        default=0.2,
        metadata=asked("--validation-share", "Share of the patients for validation.", minimum=0.01, maximum=0.9),
    )
    split: Path | None = field(
        default=None, metadata=asked("--split", "A table of the patients' parts, in place of --validation-share.")
    )
    skip_missing: bool = field(
        default=False, metadata=asked("--skip-missing", "Leave out slides that lack features or a label.")
    )
    encoder: str | None = field(
        default=None,
        metadata=asked("--encoder", "The features' encoder, if the files do not say; of stage tile, the one to train."),
    )
    token_mask: Literal["none", "tissue"] | None = field(
        default=None,
        metadata=asked(
            "--token-mask", "Token mask of the features, if the files do not say; of stage tile, in training."
        ),
    )
    width: int | None = field(
        default=None, metadata=asked("--width", "Width of the model's layers; by default the model's own.", minimum=1)
    )
    depth: int = field(default=2, metadata=asked("--depth", "Layers of a transformer.", minimum=1))
    heads: int | None = field(
        default=None, metadata=asked("--heads", "Attention heads; by default one per 64 channels.", minimum=1)
    )
    positions: Literal["none", "learn", "sine", "rotary", "alibi"] = field(
        default="none", metadata=asked("--positions", "Position embedding of vit; none works without a grid of tiles.")
    )
    dropout: float = field(
        default=0.1, metadata=asked("--dropout", "Dropout in the model's layers.", minimum=0.0, maximum=0.9)
    )
    tiles_per_slide: int | None = field(
        default=None,
        metadata=asked("--tiles-per-slide", "Tiles sampled per slide and epoch; validation reads all.", minimum=1),
    )
    drop_tokens: float = field(
        default=0.0,
        metadata=asked("--drop-tokens", "Share of the tiles dropped at random.", minimum=0.0, maximum=0.95),
    )
    instance_weight: float = field(
        default=0.3, metadata=asked("--instance-weight", "Share of CLAM's clustering loss.", minimum=0.0, maximum=1)
    )
    instances: int = field(
        default=8, metadata=asked("--instances", "Tiles of highest, and of lowest, attention in that loss.", minimum=1)
    )
    impl: str | None = field(
        default=None, metadata=asked("--impl", "Attention implementation; by default the best.", serves=None)
    )
