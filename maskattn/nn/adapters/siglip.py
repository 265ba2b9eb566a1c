"""Conversion of transformers' SigLIP: its image tower, whose attention pooling gives the image-text embedding.

Dimension key: C channels of the tower and dimensions of the shared image-text space, which are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn.adapters.clip import rename_tower
from maskattn.nn.adapters.conversion import build, refuse
from maskattn.nn.vit import VisionTransformer

__all__ = ["SIGLIP_FAMILIES", "from_siglip"]

SIGLIP_FAMILIES = ("siglip", "siglip_vision_model")
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_OUTSIDE = {
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "embeddings.position_embedding.weight": "pos_embed",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}
_IN_POOL = {
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
}


def from_siglip(
    model: Any, *, global_pool: str | None = None, impl: str | None = None, copy: bool = True
) -> VisionTransformer:
    """Convert the image tower of transformers' SigLIP; outputs are the same in eval mode.

    For ``SiglipModel`` and ``SiglipVisionModel`` the output is the result of attention pooling, which is the image's
    embedding in the shared image-text space, (B, C), not normalised. For ``SiglipForImageClassification`` it is the
    logits of the classifier over the mean of all tokens.

    Args:
        model: the transformers model.
        global_pool: pooling for a tower without attention pooling (``vision_use_head=False``): "avg" or "".
        impl: implementation of the attention; None takes the best.
        copy: whether the weights are copied; False shares them with ``model``, which must not be used afterwards.

    Raises:
        UnsupportedModelError: a ValueError that names every component without a counterpart in ours.
    """
    kind = type(model).__name__
    tower = getattr(model, "vision_model", model)
    if not hasattr(tower, "embeddings") or not hasattr(tower, "post_layernorm"):
        refuse(kind, ["it has no image tower (vision_model); convert a SiglipModel, or a SiglipVisionModel"])
    config = getattr(model.config, "vision_config", model.config)
    classifier = getattr(model, "classifier", None)
    pool = "avg" if isinstance(classifier, nn.Linear) else "map" if hasattr(tower, "head") else global_pool
    unknown = []
    if config.hidden_act not in _ACTIVATIONS:
        unknown.append(f"activation {config.hidden_act!r}")
    if pool is None:
        unknown.append("no attention pooling (vision_use_head=False), and so no pooled output; pass global_pool='avg'")
    elif global_pool not in (None, pool):
        unknown.append(f"its pooling is global_pool={pool!r}, got {global_pool!r}")
    refuse(kind, unknown)
    theirs = tower.state_dict()
    of_pool = {name: x for name, x in theirs.items() if name.startswith("head.")}
    state = rename_tower({name: x for name, x in theirs.items() if name not in of_pool}, _OUTSIDE)
    if pool == "map":
        state |= _pool(of_pool)
    if isinstance(classifier, nn.Linear):
        state |= {f"head.{name}": x for name, x in classifier.state_dict().items()}
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "global_pool": pool,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        "act_layer": _ACTIVATIONS[config.hidden_act],
        "class_token": False,
        "fc_norm": False,
        "pos_embed_resample": "transformers",
        "attn_drop_rate": config.attention_dropout,
        "norm_eps": config.layer_norm_eps,
    }
    return build(kind, arguments, state, training=model.training, impl=impl, copy=copy)


def _pool(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the pooling's tensors to our keys, and split torch's joint projection of q, k and v into q and kv."""
    ours: dict[str, Tensor] = {}
    for name, x in theirs.items():
        joined = name.removeprefix("head.attention.in_proj_")
        if joined != name:
            q, k, v = x.chunk(3)
            ours |= {f"attn_pool.q.{joined}": q, f"attn_pool.kv.{joined}": torch.cat([k, v])}
            continue
        prefix = next((prefix for prefix in _IN_POOL if name.startswith(prefix)), None)
        ours[name if prefix is None else _IN_POOL[prefix] + name.removeprefix(prefix)] = x
    return ours
