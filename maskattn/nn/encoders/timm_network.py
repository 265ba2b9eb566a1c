"""timm's networks for encoders: built with the table's arguments, with weights from the hub or from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskattn.nn.checkpoints import explained, hub_id_of
from maskattn.nn.encoders.convolutional_stem import ConvolutionalStem
from maskattn.nn.encoders.entry import EncoderEntry, triple_of
from maskattn.nn.encoders.tile_encoder import EncoderCard
from maskattn.nn.fitting import joined, misfits
from maskattn.nn.timm_import import import_timm
from maskattn.nn.unfilled import has_unfilled, unfilled
from maskattn.nn.weight_files import start_reading

__all__ = ["build_timm", "card_of_timm"]

# The keys under which training checkpoints hold the weights.
_WRAPPERS = ("state_dict", "model", "teacher")


def build_timm(entry: EncoderEntry, weights: str | Path | None, more: dict[str, Any]) -> nn.Module:
    """Build the network of an entry, without a classifier, in eval mode.

    Args:
        entry: an entry of the table, or one whose ``architecture`` is a name that timm knows.
        weights: a file of weights; None takes the hub's.
        more: arguments of ``timm.create_model`` that take precedence over the entry's.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: the weights do not fit the network (the message names the keys), or its architecture is unknown.
        PermissionError, ConnectionError, FileNotFoundError: the weights are not available; the message has the remedy.
    """
    # A file is read while timm is imported, which takes about as long for a network of 300 MB.
    read = None if weights is None else start_reading(weights)
    timm = import_timm()

    if weights is None and entry.weights_at and more.get("pretrained", True):
        raise FileNotFoundError(
            f"the weights of {entry.name} are in no hub, got no file of them; download them from {entry.weights_at} "
            "and give the file with --weights (weights=)"
        )
    arguments = {"num_classes": 0, **_layers(dict(entry.arguments)), **more}
    if weights is None and entry.file and arguments.get("pretrained", True):
        weights = _file_of_hub(entry)
        read = start_reading(weights)
    if weights is None and arguments.get("pretrained", True):
        if entry.hub_id and _takes_other_sides(entry.architecture):
            arguments = {"dynamic_img_size": True, **arguments}
        source = f"hf-hub:{entry.hub_id}" if entry.hub_id else entry.architecture
        try:
            return _pretrained(timm.create_model, source, arguments).eval()
        except Exception as error:
            raise _of_timm(
                explained(error, entry.hub_id or hub_id_of(entry.architecture)), entry.architecture
            ) from error
    if not entry.architecture:
        raise ValueError(
            f"the network of {entry.name} is described only in its hub's config.json, got a file of weights; run `hf "
            f"download {entry.hub_id}`, copy the folder here and give it as the encoder"
        )
    arguments = {**arguments, "pretrained": False}
    if entry.hub_id:
        arguments = {"dynamic_img_size": True, **arguments}
    try:
        with unfilled(mark=False) if read is not None else contextlib.nullcontext():
            network: nn.Module = timm.create_model(entry.architecture, **arguments)
    except Exception as error:
        raise _of_timm(error, entry.architecture) from error
    if read is not None:
        _fill(network, read(), f"{entry.name}, got {weights}")
    return network.eval()


def _pretrained(create: Callable[..., nn.Module], source: str, arguments: dict[str, Any]) -> nn.Module:
    """Create timm's network with the hub's weights, whose initial weights are drawn only if some are not loaded."""
    arguments = {**arguments, "pretrained": True}
    with unfilled(mark=True):
        network = create(source, **arguments)
    return create(source, **arguments) if has_unfilled(network) else network


def card_of_timm(network: Any, name: str) -> EncoderCard:
    """Return the card of a timm network from its own configuration, which has no spacing."""
    config = getattr(network, "pretrained_cfg", None) or {}
    built_for = getattr(getattr(network, "patch_embed", None), "img_size", None)
    tile_px = int(built_for[0] if built_for else config.get("input_size", (3, 224, 224))[1])
    mean, std = (triple_of(config.get(key) or (0.5,) * 3) for key in ("mean", "std"))
    pooling = getattr(network, "global_pool", "own") or "token"
    # The global_pool of a convolutional network is a module, not a name.
    return EncoderCard(name, pooling if isinstance(pooling, str) else "own", mean, std, tile_px, tile_px)


def _layers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of layers in the table's arguments by classes of timm, torch or this package."""
    layers = import_timm().layers
    for key in ("mlp_layer", "act_layer"):
        if key in arguments:
            name = arguments[key]
            arguments[key] = getattr(layers, name, None) or getattr(nn, name)
    if arguments.get("embed_layer") == ConvolutionalStem.__name__:
        arguments["embed_layer"] = ConvolutionalStem
    return arguments


def _takes_other_sides(architecture: str) -> bool:
    return architecture.startswith("vit_") or not architecture


def _file_of_hub(entry: EncoderEntry) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(entry.hub_id, entry.file))
    except Exception as error:
        raise explained(error, entry.hub_id) from error


def _fill(network: nn.Module, state: dict[str, Any], names: str) -> None:
    """Load weights, which must fit the network; a classifier's weights are left out."""
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = _of_this_timm(network, state)
    expected = {key: torch.empty(x.shape, dtype=x.dtype, device="meta") for key, x in network.state_dict().items()}
    state = {key: x for key, x in state.items() if key in expected or not key.startswith(("head.", "fc."))}
    if wrong := misfits(state, expected):
        raise ValueError(f"weights must be those of {names}: {joined(wrong)}")
    dtype = next(x.dtype for x in expected.values() if x.is_floating_point())
    state = {key: x.to(dtype) if x.is_floating_point() else x for key, x in state.items()}
    network.load_state_dict(state, assign=True)


def _of_this_timm(network: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Weights by the names of the timm that is installed.

    A Swin transformer's first files merge tokens at the end of a stage, timm at the beginning of the next.
    """
    from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

    if not isinstance(network, SwinTransformer) or "layers.0.downsample.reduction.weight" not in state:
        return state
    return dict(checkpoint_filter_fn(state, network))


def _of_timm(error: Exception, architecture: str) -> Exception:
    """Return an error that lists the nearest names if timm does not know the name; any other error unchanged."""
    if "Unknown model" not in str(error):
        return error
    import difflib

    timm = import_timm()

    close = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
    return ValueError(
        f"timm must have a model of this name, got {architecture!r}; the nearest: {', '.join(close) or 'none'}"
    )
