"""Conversion of timm's ``Eva``: the first EVA models without rotary positions, EVA-02, and DINOv3.

EVA-02 rotates adjacent channels together, our model channels that are half a head's width apart. Since scores do not
depend on the order of a head's channels, those of queries and keys are reordered. Other ``Eva`` models mix rotations or
place their norms differently, and are refused with the component named.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn.adapters.timm_parts import activation_of, mlp_layer_of, shared_arguments
from maskattn.nn.positions import RotaryGrid

__all__ = ["eva_arguments", "eva_state", "own_name", "unknown_in_eva"]


def unknown_in_eva(model: Any) -> list[str]:
    """Describe the components of this ``Eva`` that our model does not support."""
    from timm.layers import PatchEmbed
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
    from timm.models.eva import EvaAttention, EvaBlock

    rope, patch = model.rope, model.patch_embed
    if rope is not None and type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        return [f"positions {type(rope).__name__}: only DINOv3's and EVA-02's rotary positions are supported"]
    unknown = [] if rope is None else _unknown_in_rope(model.rope)
    if type(patch) is not PatchEmbed or patch.patch_size[0] != patch.patch_size[1] or patch.dynamic_img_pad:
        unknown.append("a patch embedding that pads, is not square or is no PatchEmbed")
    if model.patch_drop is not None or not isinstance(model.norm_pre, nn.Identity):
        unknown.append("patch_drop_rate or a norm before the blocks")
    if model.attn_pool is not None or model.global_pool not in ("token", "avg", ""):
        unknown.append(f"global_pool={model.global_pool!r}")
    if {type(block) for block in model.blocks} != {EvaBlock} or {type(b.attn) for b in model.blocks} != {EvaAttention}:
        return [*unknown, "blocks or attention of another kind than DINOv3's and EVA-02's"]
    if any(b.attn.gate is not None for b in model.blocks):
        unknown.append("gated attention")
    if any(b.attn.proj.in_features != model.embed_dim for b in model.blocks):
        unknown.append("attention whose width is not that of its tokens")
    if any(mlp_layer_of(block.mlp) is None or activation_of(block.mlp) is None for block in model.blocks):
        unknown.append(f"MLP {type(model.blocks[0].mlp).__name__}")
    if {type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()} != {"LayerNorm"}:
        unknown.append("norms other than LayerNorm")
    if len({m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}) > 1:
        unknown.append("norms with different eps")
    return unknown


def _unknown_in_rope(rope: Any) -> list[str]:
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

    unknown = []
    if type(rope) is RotaryEmbeddingDinoV3:
        if (rope.normalize_coords, rope.grid_offset, rope.grid_indexing) != ("separate", 0.0, "ij"):
            unknown.append("rotary positions on another grid than DINOv3's")
    elif rope.grid_type != "index" or rope.in_pixels:
        unknown.append("rotary positions in pixels or from patch centres, unlike EVA-02's")
    if rope.temperature is None or rope.aug_active:
        unknown.append("rotary positions given by periods, or moved at random in training")
    return unknown


def _rotary_grid(rope: Any) -> RotaryGrid | None:
    """Return the grid of EVA-02's positions; None for DINOv3's."""
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat

    if type(rope) is not RotaryEmbeddingCat:
        return None
    reference = None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape)
    return RotaryGrid(rope.grid_offset, reference, rope.grid_indexing == "xy")


def eva_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments of our model."""
    block = model.blocks[0]
    kinds = [kind for kind, x in (("learn", model.pos_embed), ("rotary", model.rope)) if x is not None]
    return {
        **shared_arguments(model),
        "qkv_bias": (block.attn.q_bias if block.attn.q_proj is None else block.attn.q_proj.bias) is not None,
        "init_values": None if block.gamma_1 is None else 1.0,
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "pos_embed": "_".join(kinds) or "none",
        "rope_theta": 100.0 if model.rope is None else model.rope.temperature,
        "rope_grid": _rotary_grid(model.rope),
        "norm_eps": block.norm1.eps,
    }


def eva_state(model: Any) -> dict[str, Tensor]:
    """Return the state dict under our keys, with zeros as the keys' missing bias and channels in our rotation order."""
    theirs = model.state_dict()
    state = {own_name(key): x for key, x in theirs.items()}
    for number, block in enumerate(model.blocks):
        name, attn = f"blocks.{number}.attn.", block.attn
        if attn.qkv is None:
            state[f"{name}qkv.weight"] = torch.cat([theirs[f"{name}{x}_proj.weight"] for x in "qkv"])
        q_bias, v_bias = (theirs.get(f"{name}{x}_bias", theirs.get(f"{name}{x}_proj.bias")) for x in "qv")
        if q_bias is not None and v_bias is not None:
            state[f"{name}qkv.bias"] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        if model.rope is not None and not attn.rotate_half:
            _reorder_channels(state, name, attn.num_heads)
    return state


def _reorder_channels(state: dict[str, Tensor], name: str, heads: int) -> None:
    """Put each head's even q and k channels before its odd ones, so that rotated pairs lie half a head apart."""
    width = state[f"{name}qkv.weight"].shape[0] // (3 * heads)
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    rows = (torch.arange(0, 2 * heads)[:, None] * width + order).flatten()
    for key in (f"{name}qkv.weight", f"{name}qkv.bias"):
        if key in state:
            x = state[key]
            state[key] = torch.cat([x[rows.to(x.device)], x[len(rows) :]])
    for key in (f"{name}{norm}_norm.{x}" for norm in "qk" for x in ("weight", "bias")):
        if key in state:
            state[key] = state[key][order.to(state[key].device)]


def own_name(key: str) -> str:
    """Return our key for one of its parameters; separate q, k and v parameters share one key."""
    key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)
    return re.sub(r"\.attn\.(?:[qkv]_proj\.(weight|bias)|[qv]_(bias))$", r".attn.qkv.\1\2", key)
