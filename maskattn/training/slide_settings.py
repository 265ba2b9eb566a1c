"""Which data, which task and which slide model a training is of."""

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
        features: folder of features of the slides' tiles, whatever tool wrote them.
        labels: the table of labels, a row for each slide, or for each patient beside ``slide_table``.
        out: folder of the run; made if it is not there.
        task: what is predicted.
        target: column of the labels; of survival a name for the outputs.
        model: which slide model.
        classes: the classes in their order; None takes those that the labels have, sorted.
        time: column of the time to the event, of survival.
        event: column that says whether the event was seen, of survival.
        slide_table: which slides a patient has (STAMP's slide table), where the labels do not say.
        fusion: several slides of a patient are one bag of tiles ("early"), or their scores are averaged ("late"), or
            each has its own label and prediction ("none").
        validation_share: share of the patients that choose the epoch and fit the temperature.
        split: a table of the patients' parts, in place of ``validation_share``.
        skip_missing: go on without slides that lack features or a label.
        encoder: name of the encoder of the features, where the files do not say it or hold those of several.
        token_mask: what the encoder saw of a tile, where the files do not say it.
        width: of the model's layers; None is the model's own.
        depth: layers of a transformer.
        heads: of its attention.
        positions: of the vision transformer.
        dropout: in the model's layers.
        tiles_per_slide: how many of a slide's tiles training reads each time; None reads all, as validation does, or,
            of slides that an encoder is trained on, 32.
        drop_tokens: share of the tiles read that are left out of the attention, at random.
        instance_weight: share of CLAM's clustering loss.
        instances: tiles of highest and of lowest attention that it clusters.
        impl: attention implementation.
    """

    features: Path | None = field(
        default=None,
        metadata=asked("--features", "Folder of features of TRIDENT, CLAM, STAMP, slide2vec, AtlasPatch or extract."),
    )
    labels: Path | None = field(
        default=None, metadata=asked("--labels", "Table of labels: slide_id[,patient_id] and the target's column.")
    )
    out: Path | None = field(
        default=None, metadata=asked("--out", "Folder of the run; made if it is not there.", recorded=False)
    )
    task: Literal["binary", "multiclass", "ordinal", "regression", "survival"] | None = field(
        default=None, metadata=asked("--task", f"What is predicted: {', '.join(_TASKS)}.")
    )
    target: str | None = field(default=None, metadata=asked("--target", "Column of the labels that is predicted."))
    model: Literal["vit", "mean", "max", "abmil", "clam", "transmil", "hipt"] = field(
        default="vit", metadata=asked("--model", f"Slide model: {', '.join(_MODELS)}.")
    )
    classes: tuple[str, ...] | None = field(
        default=None, metadata=asked("--class", "A class, in their order (may be repeated); by default the labels'.")
    )
    time: str | None = field(default=None, metadata=asked("--time", "Column of the time to the event, of survival."))
    event: str | None = field(
        default=None, metadata=asked("--event", "Column that says whether it was seen: 1 or 0, of survival.")
    )
    slide_table: Path | None = field(
        default=None, metadata=asked("--slide-table", "Which slides a patient has, where --labels has patients alone.")
    )
    fusion: Literal["early", "late", "none"] = field(
        default="early",
        metadata=asked(
            "--fusion", "Slides of a patient: early joins tiles, late averages scores, none labels each slide."
        ),
    )
    validation_share: float = field(
        default=0.2,
        metadata=asked("--validation-share", "Of the patients, for validation.", minimum=0.01, maximum=0.9),
    )
    split: Path | None = field(
        default=None, metadata=asked("--split", "A table of the patients' parts, in place of --validation-share.")
    )
    skip_missing: bool = field(
        default=False, metadata=asked("--skip-missing", "Go on without slides that lack features or a label.")
    )
    encoder: str | None = field(
        default=None, metadata=asked("--encoder", "Of the features, where the files do not say it or hold several.")
    )
    token_mask: Literal["none", "tissue"] | None = field(
        default=None, metadata=asked("--token-mask", "What it saw of a tile, where the files do not say it.")
    )
    width: int | None = field(
        default=None, metadata=asked("--width", "Of the model's layers; by default the model's own.", minimum=1)
    )
    depth: int = field(default=2, metadata=asked("--depth", "Layers of a transformer.", minimum=1))
    heads: int | None = field(
        default=None, metadata=asked("--heads", "Heads of its attention; by default one for 64 channels.", minimum=1)
    )
    positions: Literal["none", "learn", "sine", "rotary", "alibi"] = field(
        default="none", metadata=asked("--positions", "Of the vision transformer; none serves tiles on no grid.")
    )
    dropout: float = field(default=0.1, metadata=asked("--dropout", "In the model's layers.", minimum=0.0, maximum=0.9))
    tiles_per_slide: int | None = field(
        default=None,
        metadata=asked("--tiles-per-slide", "Tiles that training draws each time; validation reads all.", minimum=1),
    )
    drop_tokens: float = field(
        default=0.0,
        metadata=asked("--drop-tokens", "Share of the tiles left out at random.", minimum=0.0, maximum=0.95),
    )
    instance_weight: float = field(
        default=0.3, metadata=asked("--instance-weight", "Share of CLAM's clustering loss.", minimum=0.0, maximum=1)
    )
    instances: int = field(
        default=8, metadata=asked("--instances", "Tiles that it clusters on either side.", minimum=1)
    )
    impl: str | None = field(
        default=None, metadata=asked("--impl", "Attention implementation; by default the best.", serves=None)
    )
