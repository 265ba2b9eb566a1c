"""Conversion of transformers' CLIP: its image tower, with the projection into the shared image-text space as the head.

Dimension key: C channels of the tower, K dimensions of the shared space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn.adapters.conversion import build, refuse, rename_layers
from maskattn.nn.vit import VisionTransformer

__all__ = ["CLIP_FAMILIES", "from_clip", "rename_tower"]

CLIP_FAMILIES = ("clip", "clip_vision_model")
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.(.+)$")
_IN_LAYER = {
    "self_attn.out_proj.": "attn.proj.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "mlp.": "mlp.",
}
_OUTSIDE = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm.weight": "norm_pre.weight",
    "pre_layrnorm.bias": "norm_pre.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}


def from_clip(model: Any, *, impl: str | None = None, copy: bool = True) -> VisionTransformer:
    """Convert the image tower of transformers' CLIP; outputs are the same in eval mode.

    For a model with a projection (``CLIPModel``, ``CLIPVisionModelWithProjection``) the projection becomes the head,
    and the output is the image's embedding in the shared image-text space, (B, K), not normalised. For a model without
    one the output is the class token after the last norm, (B, C).

    Args:
        model: the transformers model.
        impl: implementation of the attention; None takes the best.
        copy: whether the weights are copied; False shares them with ``model``, which must not be used afterwards.

    Raises:
        UnsupportedModelError: a ValueError that names every component without a counterpart in ours.
    """
    kind = type(model).__name__
    tower = getattr(model, "vision_model", model)
    if not hasattr(tower, "embeddings") or not hasattr(tower, "encoder"):
        refuse(kind, ["it has no image tower (vision_model); convert a CLIPModel, or a CLIPVisionModel"])
    config = getattr(model.config, "vision_config", model.config)
    if config.hidden_act not in _ACTIVATIONS:
        refuse(kind, [f"activation {config.hidden_act!r}"])
    state = rename_tower(tower.state_dict(), _OUTSIDE)
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    projection = getattr(model, "visual_projection", None)
    if isinstance(projection, nn.Linear):
        state["head.weight"] = projection.weight
        state["head.bias"] = projection.weight.new_zeros(len(projection.weight))
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        "act_layer": _ACTIVATIONS[config.hidden_act],
        "pre_norm": True,
        "pos_embed_resample": "transformers",
        "attn_drop_rate": config.attention_dropout,
        "norm_eps": config.layer_norm_eps,
    }
    return build(kind, arguments, state, training=model.training, impl=impl, copy=copy)


def rename_tower(theirs: Mapping[str, Tensor], outside: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename the state dict of an image tower with CLIP's structure to our keys; q, k and v are concatenated.

    Args:
        theirs: state dict of the transformers tower.
        outside: their key → ours, for tensors outside the layers. An unknown key is kept and is refused later.
    """
    ours = rename_layers(theirs, _LAYER, _IN_LAYER, outside)
    for suffix in ("weight", "bias"):
        for name in [name for name in ours if name.endswith(f".self_attn.q_proj.{suffix}")]:
            layer = name.removesuffix(f"self_attn.q_proj.{suffix}")
            joined = [ours.pop(f"{layer}self_attn.{which}_proj.{suffix}") for which in "qkv"]
            ours[f"{layer}attn.qkv.{suffix}"] = torch.cat(joined)
    ours["pos_embed"] = ours["pos_embed"][None]
    ours.pop("embeddings.position_ids", None)
    return ours
