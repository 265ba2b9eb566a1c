"""The last step of every conversion, once the original model has been read: build ours and copy the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from maskattn.nn.blocks import Block
from maskattn.nn.fitting import misfits
from maskattn.nn.vit import VisionTransformer

__all__ = ["UnsupportedModelError", "build", "refuse", "rename_layers"]


class UnsupportedModelError(ValueError):
    """The model has a part that the packed vision transformer has not."""


def refuse(name: str, parts: list[str]) -> None:
    """Refuse a model by what it has and we have not.

    Args:
        name: what the message calls the model.
        parts: what it has and ours has not, in words.

    Raises:
        UnsupportedModelError: ``parts`` is not empty; it names them.
    """
    if parts:
        raise UnsupportedModelError(f"{name} cannot be turned into a maskattn VisionTransformer: {'; '.join(parts)}")


def build(
    name: str,
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    trains: Mapping[str, bool] | None = None,
    drop_paths: Sequence[float] = (),
    training: bool = False,
    impl: str | None = None,
    copy: bool = True,
) -> VisionTransformer:
    """Our model with these arguments and weights, on their device and in the dtype of the first.

    Args:
        name: what a message calls the model converted.
        arguments: of :class:`VisionTransformer`.
        state: its state dict; every key of ours and no other.
        trains: whether a parameter takes a gradient, by name; those not named do.
        drop_paths: stochastic depth of each block; none where empty.
        training: whether it is in train mode.
        impl: implementation of the attention.
        copy: whether the weights are copied; else they are taken over as they are, and nothing is held twice.

    Raises:
        UnsupportedModelError: keys or shapes do not fit; they are named.
    """
    # Nothing is initialised that is overwritten at once.
    with torch.device("meta"):
        model = VisionTransformer(**arguments, impl=impl)
    refuse(name, misfits(state, model.state_dict()))
    first = next(iter(state.values()))
    model = model.to(first.dtype)
    if copy:
        model = model.to_empty(device=first.device)
        model.load_state_dict(dict(state))
    else:
        model.load_state_dict({key: x.detach().to(first).contiguous() for key, x in state.items()}, assign=True)
    for block, share in zip(model.blocks, drop_paths, strict=bool(drop_paths)):
        for drop_path in (cast(Block, block).drop_path1, cast(Block, block).drop_path2):
            drop_path.share = share
    for key, parameter in model.named_parameters():
        parameter.requires_grad_((trains or {}).get(key, True))
    return model.train(training)


def rename_layers(
    theirs: Mapping[str, Tensor], layer: re.Pattern[str], in_layer: Mapping[str, str], outside: Mapping[str, str]
) -> dict[str, Tensor]:
    """A state dict under our names, as far as names alone differ.

    Args:
        theirs: of the other library.
        layer: matches the name of a layer's tensor; its groups are the layer's number and the rest of the name.
        in_layer: our beginnings of that rest, by theirs.
        outside: our names for tensors outside the layers. A name that is in neither stays, and is refused later.
    """
    ours: dict[str, Tensor] = {}
    for name, x in theirs.items():
        found = layer.match(name)
        if found is None:
            ours[outside.get(name, name)] = x
            continue
        begin = next((begin for begin in in_layer if found[2].startswith(begin)), "")
        ours[f"blocks.{found[1]}.{in_layer.get(begin, '')}{found[2].removeprefix(begin)}"] = x
    return ours
