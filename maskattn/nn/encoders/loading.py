"""Loading of tile encoders by name: from the table, timm, Hugging Face's hub, or a local file or folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskattn.nn.adapters.conch import has_conch_pool
from maskattn.nn.adapters.conversion import UnsupportedModelError
from maskattn.nn.adapters.open_clip_files import CONFIG, OpenClipFiles
from maskattn.nn.adapters.timm import from_timm
from maskattn.nn.adapters.transformers import from_transformers
from maskattn.nn.checkpoints import explained, from_state_dict, load_open_clip, load_vit, unwrapped
from maskattn.nn.encoders.entry import IMAGENET, EncoderEntry
from maskattn.nn.encoders.foreign import build_transformers
from maskattn.nn.encoders.hipt import HIPT_PATCHES, load_hipt_patches
from maskattn.nn.encoders.open_clip import encoder_of_open_clip
from maskattn.nn.encoders.table import entry_named, entry_of_hub, nearest_names
from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.encoders.timm_network import build_timm, card_of_timm
from maskattn.nn.hub_files import first_of_hub
from maskattn.nn.vit import VisionTransformer
from maskattn.nn.weight_files import read_weights

__all__ = ["load_encoder", "load_entry"]


def load_encoder(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    impl: str | None = None,
    weights: str | Path | None = None,
    num_heads: int | None = None,
    trust_code: bool = False,
    **arguments: Any,
) -> TileEncoder:
    """Load a tile encoder in eval mode.

    Args:
        name: a name of the table (``maskattn encoders``), ``timm:NAME``, ``hf-hub:ORG/NAME``, ``hipt`` with its
            ``weights``, a file of weights, or a folder with ``config.json`` or ``open_clip_config.json``.
        device: the device of the weights.
        impl: the implementation of attention; None takes the best.
        weights: a file of weights for the network that ``name`` identifies, or for CONCH and open_clip's models the
            folder that has it; None downloads them from its hub. Any other folder is given as ``name``.
        num_heads: the number of heads, for a file of weights as ``name``, which does not record it.
        trust_code: whether code in a hub's repository may be run, for encoders that are such code.
        arguments: arguments of ``timm.create_model`` (``pretrained=False`` for random weights), or of :func:`load_vit`
            for a file.

    Raises:
        ValueError: there is no such encoder (the message lists the nearest names), or it cannot be run here.
        ModuleNotFoundError: a package that it needs is not installed.
        FileNotFoundError: there is no such file.
        PermissionError, ConnectionError: the hub requires an agreement or is not reachable; the message has the remedy.
    """
    text = str(name)
    hub_id = text.removeprefix("hf-hub:") if text.startswith("hf-hub:") else None
    entry = entry_of_hub(hub_id) if hub_id else entry_named(text)
    path = Path(name)
    if text == HIPT_PATCHES and not path.exists():
        encoder = load_hipt_patches(weights, impl)
    elif entry is not None and not path.exists():
        encoder = load_entry(entry, impl=impl, weights=weights, trust_code=trust_code, **arguments)
    elif text.startswith("timm:") or hub_id is not None:
        encoder = _load_named(text, hub_id, impl, weights, trust_code, arguments)
    elif path.exists():
        if weights is not None:
            raise ValueError(
                f"weights must go with a network's name, got weights={weights} and the path {path}; give one of them"
            )
        encoder = _load_path(path, impl, num_heads, trust_code, arguments)
    elif path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"an encoder that is a path must exist, got {path}; check its folder and spelling")
    else:
        close = ", ".join(nearest_names(text)) or "none like it"
        raise ValueError(
            f"an encoder must be a name of the table, timm:NAME, hf-hub:ORG/NAME, a file or a folder, got {text!r}; "
            f"the nearest names: {close}; `maskattn encoders` lists them"
        )
    return encoder.to(device).eval()


def load_entry(
    entry: EncoderEntry,
    *,
    impl: str | None = None,
    weights: str | Path | None = None,
    trust_code: bool = False,
    **arguments: Any,
) -> TileEncoder:
    """Load an encoder of the table on the CPU. Arguments and errors as in :func:`load_encoder`."""
    if entry.remote_code and not trust_code:
        raise PermissionError(
            f"{entry.name} is code in the repository {entry.hub_id}, and loading it runs that code; read it at "
            f"https://huggingface.co/{entry.hub_id} and allow it with --trust-code (trust_code=True)"
        )
    card = EncoderCard(
        name=entry.name,
        pooling=entry.pooling,
        pixel_mean=entry.pixel_mean,
        pixel_std=entry.pixel_std,
        tile_px=entry.tile_px,
        patch_px=entry.patch_px,
        spacing_um=entry.spacing_um,
        crop_px=entry.crop_px,
        licence=entry.licence,
        why_not=entry.why_not,
    )
    network = _network_of(entry, weights, trust_code, impl, arguments)
    if entry.why_not:
        return TileEncoder(network, card, entry.embed_dim)
    encoder = _packed_where_it_can_be(network, card, impl, entry.embed_dim)
    if encoder.embed_dim != entry.embed_dim:
        raise ValueError(
            f"{entry.name} has features of width {entry.embed_dim}, got a network of {encoder.embed_dim}; give the "
            "weights of this encoder"
        )
    return encoder


def _network_of(
    entry: EncoderEntry, weights: str | Path | None, trust_code: bool, impl: str | None, arguments: dict[str, Any]
) -> nn.Module:
    """Build an entry's network with the library's own code, or as ours, and load its weights."""
    if entry.library == "timm":
        return build_timm(entry, weights, arguments)
    ours = {"open_clip": _open_clip_of, "conch": _conch_of}.get(entry.library)
    if ours is None:
        _refuse_file(entry.name, entry.library, entry.hub_id, weights)
    try:
        if ours is not None:
            return ours(entry, None if weights is None else Path(weights), impl, arguments)
        return build_transformers(entry.hub_id, trust_code, arguments)
    except Exception as error:
        raise explained(error, entry.hub_id) from error


def _refuse_file(name: str, library: str, hub_id: str, weights: str | Path | None) -> None:
    """Raise an error if a file of weights is given for a network that its library loads from a folder."""
    if weights is not None:
        raise ValueError(
            f"{name} is loaded by {library}, which takes a folder, got the file {weights}; run `hf download {hub_id}` "
            "on a machine with a network, copy the folder here, and give it as the encoder"
        )


def _open_clip_of(
    entry: EncoderEntry, weights: Path | None, impl: str | None, arguments: dict[str, Any]
) -> VisionTransformer:
    """Load the image tower with its projection from the hub, a folder, or a file with its configuration beside it."""
    if weights is None:
        files = OpenClipFiles.of_hub(entry.hub_id)
    else:
        files = OpenClipFiles.of_folder(weights) if weights.is_dir() else OpenClipFiles.of_weights(weights)
    return load_open_clip(files, impl, arguments)


def _conch_of(
    entry: EncoderEntry, weights: Path | None, impl: str | None, arguments: dict[str, Any]
) -> VisionTransformer:
    """Load CONCH without its projection, as its authors advise for features of images alone."""
    path = first_of_hub(entry.hub_id, (entry.file,)) if weights is None else weights
    path = path / entry.file if path.is_dir() else path
    state = unwrapped(read_weights(path))
    if not has_conch_pool(state):
        raise ValueError(
            f"weights must be those of {entry.name}, whose tower has attn_pool_contrast, got {path} without; give the "
            f"{entry.file} of {entry.hub_id}"
        )
    return from_state_dict(state, name=str(path), impl=impl, copy=False, **{"num_classes": 0, **arguments})


def _packed_where_it_can_be(
    network: nn.Module, card: EncoderCard, impl: str | None, embed_dim: int | None = None
) -> TileEncoder:
    """Convert a library's network to a packed transformer; if it cannot be, use the network itself and record why."""
    if isinstance(network, VisionTransformer):
        return TileEncoder(network, card)
    convert = from_timm if hasattr(network, "forward_head") else from_transformers
    try:
        if convert is from_transformers and not hasattr(network, "config"):
            raise UnsupportedModelError(f"{type(network).__name__} belongs to no supported library")
        own = getattr(network, "global_pool", None)
        clip = getattr(getattr(network, "config", None), "model_type", "").startswith("clip")
        asked = None if clip or card.pooling in (own, "own") else card.pooling
        return TileEncoder(convert(network, global_pool=asked, impl=impl, copy=False), card)
    except UnsupportedModelError as error:
        width = embed_dim or getattr(network, "num_features", None)
        return TileEncoder(network, replace(card, why_not=str(error)), width)


def _load_named(
    text: str,
    hub_id: str | None,
    impl: str | None,
    weights: str | Path | None,
    trust_code: bool,
    arguments: dict[str, Any],
) -> TileEncoder:
    """Load a model of timm or the hub that is not in the table, with the input that its own configuration states."""
    if hub_id is not None:
        try:
            path = first_of_hub(hub_id, ("config.json", CONFIG))
            if path.name == CONFIG:
                files = OpenClipFiles.of_hub(hub_id) if weights is None else OpenClipFiles(path, Path(weights))
                return encoder_of_open_clip(files, text, impl, arguments)
        except Exception as error:
            raise explained(error, hub_id) from error
        config = json.loads(path.read_text(encoding="utf-8"))
        if "model_type" in config:
            _refuse_file(text, "transformers", hub_id, weights)
            return _load_transformers(hub_id, text, impl, trust_code, arguments)
    name = f"hf-hub:{hub_id}" if hub_id is not None else text.removeprefix("timm:")
    return _load_timm(name, text, impl, weights, arguments)


def _load_timm(
    name: str, shown: str, impl: str | None, weights: str | Path | None, arguments: dict[str, Any]
) -> TileEncoder:
    entry = EncoderEntry(shown, shown, "timm", "", 0, "token", *IMAGENET, 0, 0, None, "", "", architecture=name)
    network = build_timm(entry, weights, arguments)
    return _packed_where_it_can_be(network, card_of_timm(network, shown), impl)


def _load_transformers(
    source: str, shown: str, impl: str | None, trust_code: bool, arguments: dict[str, Any]
) -> TileEncoder:
    from maskattn.nn.encoders.foreign import card_of_transformers

    try:
        network = build_transformers(source, trust_code, arguments)
        card = card_of_transformers(network, source, shown)
    except Exception as error:
        raise explained(error, source) from error
    return _packed_where_it_can_be(network, card, impl, getattr(network, "embed_dim", None))


def _load_path(
    path: Path, impl: str | None, num_heads: int | None, trust_code: bool, arguments: dict[str, Any]
) -> TileEncoder:
    """Load a folder as timm, transformers or open_clip wrote it, or a file of weights with ImageNet's statistics."""
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / CONFIG).is_file():
            return encoder_of_open_clip(OpenClipFiles.of_folder(path), path.name, impl, arguments)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"an encoder's folder must have a config.json or {CONFIG}, got neither in {path}; give the file of "
                "weights"
            )
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "model_type" in config:
            return _load_transformers(str(path), path.name, impl, trust_code, arguments)
        return _load_timm(f"local-dir:{path}", path.name, impl, None, arguments)
    if num_heads is None:
        raise ValueError(
            f"a file of weights needs a network or its number of heads, got {path} alone; name the network, "
            f"`--encoder timm:NAME --weights {path}` or a name of the table, or give --num-heads"
        )
    vit = load_vit(path, num_heads=num_heads, impl=impl, **arguments)
    tile_px = vit.grid_HW[0] * int(vit.patch_embed.patch_size)
    card = EncoderCard(path.stem, vit.global_pool, *IMAGENET, tile_px, tile_px)
    return TileEncoder(vit, card)
