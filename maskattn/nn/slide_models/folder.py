"""A slide model on disk: a folder with ``config.json``, ``model.safetensors`` and a readable card, ``README.md``.

This module also loads everything else that ``--model`` accepts: models in this package's earlier format of two files,
and other tools' checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskattn.files import replacing
from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.fitting import joined, misfits
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.slide_models.card import CONFIG, README, WEIGHTS, ModelCard, mismatches, read_card
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.kinds import HEADS, head_of_kind
from maskattn.nn.slide_models.reading import read_checkpoint, tensors_of
from maskattn.nn.slide_models.two_stage import TwoStageModel, card_of, two_stages, with_encoder
from maskattn.nn.vit import VisionTransformer

__all__ = ["card_of_checkpoint", "load_model_folder", "load_two_stages", "save_model"]


def save_model(
    folder: str | Path,
    model: SlideModel | TwoStageModel | SlideHead,
    card: ModelCard | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a slide model as a folder; each file is replaced atomically, and the configuration is written last.

    Args:
        folder: output folder; created if it does not exist.
        model: this package's own model, an encoder with a head, or a head alone. An encoder that is not this package's
            is not stored; the card records its name and hash.
        card: the model's card; required for a head alone.
        dtype: dtype of the stored weights; None keeps that of the model.

    Returns:
        The folder.

    Raises:
        ValueError: a head has no card, or the card does not match it.
    """
    from safetensors.torch import save

    folder = Path(folder)
    if isinstance(model, TwoStageModel):
        card = card or model.card
        model = model.whole[0] or model.head
    if isinstance(model, SlideModel):
        card, state = card or card_of(model), model.state_dict()
    else:
        if card is None:
            raise ValueError("a slide head must have a card that names its classes, got no card; give a ModelCard")
        card, state = replace(card, kind=model.kind, head=model.arguments()), model.state_dict()
        TwoStageModel(model, card)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (WEIGHTS, save({key: x.detach().cpu().to(dtype or x.dtype).contiguous() for key, x in state.items()})),
        (README, card.markdown().encode()),
        (CONFIG, card.to_json().encode()),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder


def load_model_folder(folder: str | Path, impl: str | None = None) -> tuple[SlideModel | SlideHead, ModelCard]:
    """Read what :func:`save_model` wrote, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not match the configuration; the message lists keys and shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder, card = Path(folder), read_card(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"a slide model is a folder with {CONFIG} and {WEIGHTS}, got {folder} without {WEIGHTS}"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"a model's weights must be a complete .safetensors file, got {path}: {error}; copy it again"
        ) from error
    model: SlideModel | SlideHead
    if card.kind == "slide_model":
        model = SlideModel(SlideModelConfig.from_dict(card.slide_model or {}), impl)
    elif card.kind in HEADS:
        try:
            model = head_of_kind(card.kind, card.head, impl)
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG} must have the arguments of a {card.kind} head: {error}") from error
    else:
        kinds = ", ".join(["slide_model", *HEADS])
        raise ValueError(
            f"a slide model's kind must be one of {kinds}, got {card.kind!r} in {folder / CONFIG}; update maskattn"
        )
    _check_state(path, state, model.state_dict())
    dtype = next(x.dtype for x in state.values() if x.is_floating_point())
    if isinstance(model, SlideHead):
        model = model.to(dtype if dtype == torch.float64 else torch.float32)
    model.load_state_dict(state)
    return model.eval(), card


def load_two_stages(
    path: str | Path,
    encoder: TileEncoder | None = None,
    *,
    classes: Sequence[str] | None = None,
    patch_px: int | None = None,
    spacing_um: float | None = None,
    token_mask: str | None = None,
    other_encoder: bool = False,
    impl: str | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> TwoStageModel:
    """Load any model that ``--model`` accepts: a folder, ``NAME.safetensors`` with ``NAME.json``, or a checkpoint.

    Args:
        path: the model.
        encoder: the tile encoder; None for this package's own models, which include one. HIPT's and soma's models take
            the encoder of their patches, or read stored features of patches without one.
        classes: names of the logits; None takes the model's.
        patch_px: side of a tile in px; None takes the model's or the encoder's. For HIPT's and soma's models, the side
            of a region; None takes 4096.
        spacing_um: µm per px of a tile; None takes the model's or the encoder's.
        token_mask: "none" or "tissue"; None takes the model's.
        other_encoder: whether to accept an encoder, a spacing or a mask that the model was not trained with.
        impl: implementation of the attention; None takes the best.
        device: device of the model.
        options: options of :func:`maskattn.nn.load_slide_head` for a checkpoint.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model cannot be read, or the arguments differ from its training.
    """
    path, region_level = Path(path), None
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        model, card = load_model_folder(path, impl)
    elif path.suffix == ".safetensors" and path.with_suffix(".json").is_file():
        own = SlideModel.load(path, impl=impl)
        model, card = own, card_of(own)
    elif path.is_file():
        state = tensors_of(read_checkpoint(path))
        if any(key.startswith("vit_region.") for key in state):
            model, card, region_level = _of_regions(path, state, classes, impl)
            if encoder is not None:
                encoder, region_level = RegionEncoder(encoder, region_level, patch_px or 4096), None
        else:
            model, card = _of_checkpoint(path, classes, {**options, "impl": impl})
    else:
        raise FileNotFoundError(
            "a slide model must be a folder, a checkpoint, or NAME.safetensors with NAME.json in the same folder, got "
            f"{path}, which does not exist; check its spelling"
        )
    if isinstance(model, SlideModel):
        if encoder is not None:
            raise ValueError(
                f"{card.name} includes the tile encoder that it must be run with, got {encoder.name}; leave --encoder "
                "out"
            )
        if token_mask not in (None, card.token_mask):
            raise ValueError(
                f"{card.name} must be run with its token mask, {card.token_mask!r}, got {token_mask!r}; leave "
                "--token-mask out (--no-mask attends to glass too)"
            )
        return two_stages(model.to(device).eval())
    if classes is not None:
        card = replace(card, classes=tuple(classes))
    if encoder is not None:
        trained = card
        card = with_encoder(card, encoder, patch_px=patch_px, spacing_um=spacing_um, token_mask=token_mask)
        wrong = list(mismatches(trained, card))
        if wrong and not other_encoder:
            raise ValueError(
                f"a slide model must be run as it was trained, got {'; '.join(wrong)} for {card.name}; change the "
                "arguments to match, or pass --other-encoder to run it anyway"
            )
        if card.token_mask == "tissue" and encoder.vit is None:
            raise ValueError(
                f"--token-mask tissue needs a packed vision transformer, got {encoder.name}: {encoder.why_not}; leave "
                "it out"
            )
    # The embeddings of a run are float32, whatever the precision of the stored weights.
    return TwoStageModel(model.float(), card, encoder, region_level=region_level).to(device).eval()


def card_of_checkpoint(path: Path) -> ModelCard:
    """Return the card of another tool's checkpoint, with the facts that the checkpoint has.

    Raises:
        ValueError: the checkpoint's layout is unknown.
    """
    return _of_checkpoint(path, None, {})[1]


def _of_checkpoint(path: Path, classes: Sequence[str] | None, options: dict[str, Any]) -> tuple[SlideHead, ModelCard]:
    from maskattn.nn.slide_models.layouts import load_slide_head

    found = load_slide_head(path, **options)
    names = tuple(classes or found.classes or (f"class {k}" for k in range(found.head.num_classes)))
    card = ModelCard(
        name=path.stem,
        kind=found.head.kind,
        classes=names,
        head=found.head.arguments(),
        layout=found.layout,
        facts=found.facts,
    )
    return found.head, card


def _of_regions(
    path: Path,
    state: Mapping[str, Tensor],
    classes: Sequence[str] | None,
    impl: str | None,
) -> tuple[SlideHead, ModelCard, VisionTransformer]:
    """Load HIPT's or soma's model as the head that reads regions, its card, and the transformer that embeds regions."""
    from maskattn.nn.hipt_checkpoints import hipt_from_state_dict

    model = hipt_from_state_dict(state, name=str(path), impl=impl).float()
    head = model.slide_encoder
    assert isinstance(head, SlideHead), "a checkpoint of HIPT has HIPT's slide level"
    card = ModelCard(
        name=path.stem,
        kind=head.kind,
        classes=tuple(classes or (f"class {k}" for k in range(head.num_classes))),
        head=head.arguments(),
        layout="HIPT",
    )
    return head, card, model.region_encoder


def _check_state(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if wrong := misfits(state, expected):
        raise ValueError(f"weights and configuration must be of the same model, got {path}: {joined(wrong)}; copy both")
