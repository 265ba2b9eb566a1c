"""Components of timm's models in terms of our arguments."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["activation_of", "mlp_layer_of", "shared_arguments"]

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}


def shared_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments of our model that timm's ``VisionTransformer`` and ``Eva`` provide in the same way."""
    block, patch = model.blocks[0], model.patch_embed
    hidden = block.mlp.fc1_g if hasattr(block.mlp, "fc1_g") else block.mlp.fc1
    return {
        "img_size": tuple(patch.img_size),
        "patch_size": patch.patch_size[0],
        "in_chans": patch.proj.in_channels,
        "num_classes": 0 if isinstance(model.head, nn.Identity) else model.head.out_features,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        # The extra half feature makes int(dim · ratio) this width, however the division rounds.
        "mlp_ratio": (hidden.out_features + 0.5) / model.embed_dim,
        "mlp_layer": mlp_layer_of(block.mlp),
        "act_layer": activation_of(block.mlp),
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "no_embed_class": model.no_embed_class,
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
    }


def activation_of(mlp: Any) -> str | None:
    """Return our name for the activation of a timm MLP; None if ours does not support it."""
    name = _ACTIVATIONS.get(type(mlp.act).__name__)
    return "gelu_tanh" if name == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh" else name


def mlp_layer_of(mlp: Any) -> str | None:
    """Return our name for the kind of a timm MLP; None if ours does not support it."""
    from timm.layers import GluMlp, Mlp, SwiGLU

    if type(mlp) is Mlp:
        return "mlp"
    if type(mlp) is GluMlp and not mlp.gate_last:
        return "swiglu_packed"
    return "swiglu" if type(mlp) is SwiGLU else None
