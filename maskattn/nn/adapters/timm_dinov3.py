"""DINOv3 as timm has it: an ``Eva`` with DINOv3's rotary positions; and EVA's first models, without rotary ones.

Other Evas rotate otherwise, mix rotations or normalise elsewhere, and are refused by name.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn.adapters.timm_parts import activation_of, mlp_layer_of

__all__ = ["dinov3_arguments", "dinov3_state", "own_name", "unknown_in_dinov3"]


def unknown_in_dinov3(model: Any) -> list[str]:
    """What this ``Eva`` has and ours has not, in words."""
    from timm.layers import PatchEmbed
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
    from timm.models.eva import EvaAttention, EvaBlock

    rope, patch = model.rope, model.patch_embed
    if rope is not None and type(rope) is not RotaryEmbeddingDinoV3:
        return [f"positions {type(rope).__name__}: of rotary ones, DINOv3's alone are known"]
    unknown = [] if rope is None else _unknown_in_rope(model)
    if type(patch) is not PatchEmbed or patch.patch_size[0] != patch.patch_size[1] or patch.dynamic_img_pad:
        unknown.append("a patch embedding that pads, or is not square or not plain")
    if model.patch_drop is not None or not isinstance(model.norm_pre, nn.Identity):
        unknown.append("patch_drop_rate or a norm before the blocks")
    if model.attn_pool is not None or model.global_pool not in ("token", "avg", ""):
        unknown.append(f"global_pool={model.global_pool!r}")
    if {type(block) for block in model.blocks} != {EvaBlock} or {type(b.attn) for b in model.blocks} != {EvaAttention}:
        return [*unknown, "blocks or attention of another kind than DINOv3's"]
    if any(b.attn.qkv is None or b.attn.gate is not None for b in model.blocks):
        unknown.append("separate q, k and v, or gated attention")
    if any(mlp_layer_of(block.mlp) is None or activation_of(block.mlp) is None for block in model.blocks):
        unknown.append(f"MLP {type(model.blocks[0].mlp).__name__}")
    if {type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()} != {"LayerNorm"}:
        unknown.append("norms that are no LayerNorm")
    if len({m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}) > 1:
        unknown.append("norms with different eps")
    return unknown


def _unknown_in_rope(model: Any) -> list[str]:
    rope, unknown = model.rope, []
    if (rope.normalize_coords, rope.grid_offset, rope.grid_indexing, rope.rotate_half) != ("separate", 0.0, "ij", True):
        unknown.append("rotary positions with another grid or rotation than DINOv3's")
    if rope.temperature is None or rope.aug_active:
        unknown.append("rotary positions given by periods, or moved at random in training")
    if model.pos_embed is not None:
        unknown.append("learnt positions beside the rotary ones")
    return unknown


def dinov3_arguments(model: Any) -> dict[str, Any]:
    """The arguments of our model."""
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
        # Half a feature more, so that int(dim · ratio) is this count whatever the division rounds to.
        "mlp_ratio": (hidden.out_features + 0.5) / model.embed_dim,
        "mlp_layer": mlp_layer_of(block.mlp),
        "act_layer": activation_of(block.mlp),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "qkv_bias": block.attn.q_bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": None if block.gamma_1 is None else 1.0,
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pos_embed": "rotary" if model.rope is not None else "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "rope_theta": 100.0 if model.rope is None else model.rope.temperature,
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "norm_eps": block.norm1.eps,
    }


def dinov3_state(model: Any) -> dict[str, Tensor]:
    """Its state dict under our names; the bias that keys have not is 0."""
    theirs = model.state_dict()
    state = {own_name(key): x for key, x in theirs.items()}
    for key in [key for key in theirs if key.endswith("attn.q_bias")]:
        q, v = theirs[key], theirs[key.replace("q_bias", "v_bias")]
        state[own_name(key)] = torch.cat([q, torch.zeros_like(q), v])
    return state


def own_name(key: str) -> str:
    """Our name of one of its parameters; q's and v's biases are parts of one."""
    key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)
    return re.sub(r"\.attn\.[qv]_bias$", ".attn.qkv.bias", key)
