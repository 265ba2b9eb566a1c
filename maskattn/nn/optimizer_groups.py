"""Parameter groups for fine-tuning: lower learning rates for lower layers, no decay for norms, biases and tokens.

The groups are those that ``timm.optim.param_groups_layer_decay`` makes of a packed model; timm is not needed.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from maskattn.nn.vit import VisionTransformer

__all__ = ["layer_groups"]

_STEM = re.compile(r"^(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def layer_groups(
    model: VisionTransformer, lr: float, *, layer_decay: float = 0.75, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer, with a learning rate that decays from layer to layer.

    The top layer learns at ``lr``, each layer below it at ``layer_decay`` times the rate of the next higher one. The
    layers are, from the top: the head and the attention pool (if there are any), the last block with the last norm, the
    other blocks, embeddings and prefix tokens.

    Args:
        model: a packed vision transformer; parameters that take no gradient are left out.
        lr: the learning rate of the top layer.
        layer_decay: the factor from layer to layer, in (0, 1].
        weight_decay: the weight decay of matrices; vectors, positions and tokens have none.

    Returns:
        Groups with ``params``, ``lr``, ``lr_scale`` and ``weight_decay``, from the lowest layer to the highest.

    Raises:
        ValueError: layer_decay is outside (0, 1].

    Example:
        >>> vit = VisionTransformer(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=2)
        >>> optimizer = torch.optim.AdamW(layer_groups(vit, lr=1e-3))
        >>> round(optimizer.param_groups[0]["lr"] / 1e-3, 6) == 0.75**3
        True
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    without_decay = model.no_weight_decay()
    depth = len(model.blocks)
    top = max(_layer(name, depth) for name, _ in model.named_parameters())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in without_decay
            groups.setdefault((_layer(name, depth), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": layer_decay ** (top - layer),
            "lr": lr * layer_decay ** (top - layer),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _layer(name: str, depth: int) -> int:
    """Return a parameter's layer: 0 for the stem, 1 … depth for blocks, depth for the norm, depth + 1 for the head."""
    if _STEM.match(name):
        return 0
    block = _BLOCK.match(name)
    if block:
        return 1 + int(block[1])
    return depth if name.startswith("norm") else depth + 1
