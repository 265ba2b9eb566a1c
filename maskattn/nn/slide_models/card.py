"""A slide model's card, stored as ``config.json``: the model's kind, classes, training data and tile encoder.

This module does not import torch, so that a card can be printed without delay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["CONFIG", "README", "WEIGHTS", "EncoderFacts", "ModelCard", "card_at", "mismatches", "read_card"]

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
_FORMAT = 1


@dataclass(frozen=True)
class EncoderFacts:
    """The tile encoder that a slide model was trained with.

    Attributes:
        name: the encoder's name in ``maskattn encoders`` or in the feature files.
        width: number of channels of its features.
        sha256: SHA-256 of its weights; empty if unknown.
    """

    name: str
    width: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The metadata of a slide model.

    Attributes:
        name: name shown in outputs.
        kind: kind of the head, or "slide_model" for this package's own models, which include an encoder.
        classes: names of the K logits.
        head: arguments that rebuild the head.
        encoder: the tile encoder; None if unknown.
        tile_px: side of the encoder's input image in px; None if unknown.
        patch_px: side of a tile before it is resized to ``tile_px``, in px of ``spacing_um``; None if unknown.
        spacing_um: µm per px of a tile; None if unknown.
        token_mask: "none" if the encoder processed every token of a tile, "tissue" if only those with tissue; None if
            unknown.
        pixel_mean, pixel_std: normalisation per channel, for pixels scaled to [0, 1]; None if unknown.
        trained_on: description of the training data.
        metrics: name → value; the name says on which data.
        layout: the tool and model whose checkpoint layout was read; empty for this package's own.
        facts: further facts from that checkpoint, name → value.
        demonstration: whether the classes mean nothing outside the package's own synthetic slides.
        note: a sentence that outputs repeat.
        slide_model: the configuration of a :class:`maskattn.nn.SlideModel`; None for other kinds.
        task: the training task. For "regression" and "survival" the logit itself is the value or the log risk; for all
            others the scores are the softmax of the logits. Empty if unknown.
        target: the label's name for the predicted quantity.
        temperature: divisor of the logits before the softmax, fitted on validation cases.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    head: dict[str, Any] = field(default_factory=dict)
    encoder: EncoderFacts | None = None
    tile_px: int | None = None
    patch_px: int | None = None
    spacing_um: float | None = None
    token_mask: Literal["none", "tissue"] | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    trained_on: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    layout: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    demonstration: bool = False
    note: str = ""
    slide_model: dict[str, Any] | None = None
    task: str = ""
    target: str = ""
    temperature: float = 1.0

    @property
    def gives_values(self) -> bool:
        """Whether the outputs are values rather than class scores."""
        return self.task in ("regression", "survival")

    def to_json(self) -> str:
        """Return the card as indented JSON."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the configuration") -> ModelCard:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not a slide model's configuration; the message lists the offending keys.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a slide model's {CONFIG} must be JSON, got {where}: {error}") from error
        known = {one.name for one in fields(cls)} | {"format"}
        keys = set(values) if isinstance(values, dict) else set()
        unknown, missing = sorted(keys - known), sorted({"name", "kind", "classes"} - keys)
        if unknown or missing:
            raise ValueError(
                f"a slide model's {CONFIG} must have name, kind and classes, got {where} with unknown keys {unknown} "
                f"and without {missing}; is it another tool's, or a later version's?"
            )
        if values.pop("format", _FORMAT) != _FORMAT:
            raise ValueError(f"a slide model's {CONFIG} must be of format {_FORMAT}, got {where}; update maskattn")
        if values.get("encoder") is not None:
            values["encoder"] = EncoderFacts(**values["encoder"])
        for name in ("classes", "pixel_mean", "pixel_std"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Return the card as readable (name, value) pairs; unknown facts are left out."""
        yield "name", self.name
        yield "kind", self.kind + (f" ({self.layout})" if self.layout else "")
        if self.task:
            yield "task", f"{self.task} of {self.target}" if self.target else self.task
        yield ("value" if self.gives_values else "classes"), ", ".join(self.classes)
        if self.temperature != 1:
            yield "temperature", f"{self.temperature:.4g}"
        if self.encoder is not None:
            known = f", SHA-256 of its weights begins {self.encoder.sha256[:16]}" if self.encoder.sha256 else ""
            yield "encoder", f"{self.encoder.name}, {self.encoder.width} channels{known}"
        if self.patch_px is not None and self.spacing_um is not None:
            seen = f", resized to {self.tile_px} px" if self.tile_px not in (None, self.patch_px) else ""
            yield "tiles", f"{self.patch_px} px of {self.spacing_um:g} µm{seen}"
        if self.token_mask is not None:
            every = (
                "every token of a tile takes part" if self.token_mask == "none" else "background tokens take no part"
            )
            yield "token mask", f"{self.token_mask}: {every}"
        if self.pixel_mean is not None and self.pixel_std is not None:
            mean, std = (" ".join(f"{x:g}" for x in values) for values in (self.pixel_mean, self.pixel_std))
            yield "pixels", f"mean {mean}, standard deviation {std}"
        if self.trained_on:
            yield "trained on", self.trained_on
        for name, value in self.metrics.items():
            yield name, f"{value:g}"
        yield from self.facts.items()
        if self.demonstration:
            yield "demonstration", "yes: its classes mean nothing on real tissue"
        if self.note:
            yield "note", self.note

    def markdown(self) -> str:
        """Return the card as the Markdown of the folder's README."""
        rows = "\n".join(f"| {what} | {value} |" for what, value in list(self.lines())[1:])
        return (
            f"# {self.name}\n\nA slide model of maskattn: `maskattn infer SLIDE --model FOLDER`.\n\n"
            f"| | |\n|---|---|\n{rows}\n"
        )


def read_card(folder: str | Path) -> ModelCard:
    """Read the card of a model folder.

    Raises:
        FileNotFoundError: the folder has no configuration.
        ValueError: the configuration is not a slide model's.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"a slide model is a folder with {CONFIG}, {WEIGHTS} and {README}, got {folder} without {CONFIG}"
        )
    return ModelCard.from_json(path.read_text(encoding="utf-8"), str(path))


def card_at(path: str | Path) -> ModelCard | None:
    """Read the card of any slide model, other tools' checkpoints included; None if the path is not a slide model.

    Raises:
        ValueError: the model cannot be read.
    """
    path = Path(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if (path / CONFIG).is_file():
        return read_card(path)
    if path.suffix == ".safetensors" and path.with_suffix(".json").is_file():
        return _card_of_two_files(path)
    if path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        from maskattn.nn.slide_models.folder import card_of_checkpoint  # imports torch

        return card_of_checkpoint(path)
    return None


def _card_of_two_files(path: Path) -> ModelCard:
    """Read the card of a model in this package's earlier format, NAME.safetensors with NAME.json."""
    config = path.with_suffix(".json")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return ModelCard(
            name=values["name"],
            kind="slide_model",
            classes=tuple(values["classes"]),
            tile_px=values["tile_px"],
            patch_px=values["tile_px"],
            spacing_um=values["spacing_um"],
            token_mask="tissue" if values.get("masked", True) else "none",
            demonstration=values.get("demonstration", False),
            note=values.get("note", ""),
            slide_model=values,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"a slide model's configuration must be complete JSON, got {config}: {error!r}; copy it again"
        ) from error


def mismatches(trained: ModelCard, given: ModelCard) -> list[str]:
    """List the differences between a run and the model's training; facts that either lacks are not compared."""
    compared: list[tuple[str, Any, Any]] = []
    if trained.encoder is not None and given.encoder is not None:
        compared.append(("encoder", _plain(trained.encoder.name), _plain(given.encoder.name)))
        compared.append(("width of features", trained.encoder.width, given.encoder.width))
        if trained.encoder.sha256 and given.encoder.sha256:
            compared.append(("hash of the encoder's weights", trained.encoder.sha256[:16], given.encoder.sha256[:16]))
    compared.append(("token mask", trained.token_mask, given.token_mask))
    if trained.spacing_um and given.spacing_um and abs(given.spacing_um / trained.spacing_um - 1) <= 0.05:
        given = replace(given, spacing_um=trained.spacing_um)
    compared.append(("µm per pixel", trained.spacing_um, given.spacing_um))
    compared.append(("side of a tile in px", trained.patch_px, given.patch_px))
    return [
        f"{what} {found} instead of {expected}"
        for what, expected, found in compared
        if expected is not None and found is not None and expected != found
    ]


def _plain(name: str) -> str:
    """Return an encoder's name without its source prefix and in one spelling."""
    return name.rpartition(":")[2].rpartition("/")[2].lower().replace("_", "-")
