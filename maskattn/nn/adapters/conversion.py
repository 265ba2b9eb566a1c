"""The last step of every conversion: our model is built and receives the weights of the original."""

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
    """The model has a component that the packed vision transformer does not support."""


def refuse(name: str, parts: list[str]) -> None:
    """Refuse a model that has unsupported components; do nothing if it has none.

    Args:
        name: the model's name in the message.
        parts: descriptions of the components without a counterpart in ours.

    Raises:
        UnsupportedModelError: ``parts`` is not empty; the message lists them.
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
    """Build our model with these arguments and weights, on the device and in the dtype of the first tensor.

    Args:
        name: the original model's name in messages.
        arguments: arguments of :class:`VisionTransformer`.
        state: state dict, with exactly the keys of ours.
        trains: parameter name → whether it requires a gradient; parameters that are not listed do.
        drop_paths: drop probability of stochastic depth for each block; empty for none.
        training: whether the result is in train mode.
        impl: implementation of the attention; None takes the best.
        copy: whether the weights are copied; False uses the tensors themselves, so that memory holds them once.

    Raises:
        UnsupportedModelError: keys or shapes do not match; the message lists them.
    """
    # On the meta device no weight is initialised only to be overwritten.
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
    """Rename the keys of a state dict to ours, without changing a tensor.

    Args:
        theirs: state dict of the other library.
        layer: pattern for a key inside a layer; its groups are the layer's index and the rest of the key.
        in_layer: their prefix of that rest → ours.
        outside: their key → ours, for tensors outside the layers. An unknown key is kept and is refused later.
    """
    ours: dict[str, Tensor] = {}
    for name, x in theirs.items():
        found = layer.match(name)
        if found is None:
            ours[outside.get(name, name)] = x
            continue
        prefix = next((prefix for prefix in in_layer if found[2].startswith(prefix)), "")
        ours[f"blocks.{found[1]}.{in_layer.get(prefix, '')}{found[2].removeprefix(prefix)}"] = x
    return ours
