"""Families of other libraries' models with random weights: build one, convert it, and run it on kept tokens.

``kept_output`` is the original's own code on the tokens that are left when background is dropped after the position
embedding: what a packed model must equal.

Dimension key: N grid tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.nn import VisionTransformer, from_timm, from_transformers

__all__ = ["EVA", "FAMILIES", "TIMM", "TRANSFORMERS", "Family", "Size", "timm_eva", "timm_vit"]


@dataclass(frozen=True)
class Size:
    """The sizes of a family's model."""

    img_size: int = 64
    patch_size: int = 16
    dim: int = 48
    depth: int = 3
    heads: int = 3
    classes: int = 5


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: its name in tables.
        original: builds the other library's model.
        convert: turns it into ours.
        output: its output for images, in the form of ours.
        kept_output: the same of one image (1, 3, H, W) from its kept tokens (N,) alone.
    """

    name: str
    original: Callable[[Size], nn.Module]
    convert: Callable[[nn.Module], VisionTransformer]
    output: Callable[[Any, Tensor], Tensor]
    kept_output: Callable[[Any, Tensor, Tensor], Tensor]


def timm_vit(size: Size, **arguments: Any) -> nn.Module:
    import timm

    common = {"img_size": size.img_size, "patch_size": size.patch_size, "embed_dim": size.dim}
    common |= {"depth": size.depth, "num_heads": size.heads, "num_classes": size.classes}
    return timm.models.VisionTransformer(**{**common, **arguments})


def _swiglu(size: Size, **arguments: Any) -> nn.Module:
    from timm.layers import SwiGLU

    return timm_vit(size, mlp_layer=SwiGLU, act_layer=nn.SiLU, mlp_ratio=8 / 3, **arguments)


def _swiglu_packed(size: Size, **arguments: Any) -> nn.Module:
    from timm.layers import SwiGLUPacked

    return timm_vit(size, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=16 / 3, init_values=1e-5, **arguments)


def _timm_kept(model: Any, x: Tensor, keep_N: Tensor) -> Tensor:
    tokens = model._pos_embed(model.patch_embed(x))
    prefix = torch.ones(model.num_prefix_tokens, dtype=torch.bool)
    kept = model.norm_pre(tokens[:, torch.cat([prefix, keep_N])])
    return model.forward_head(model.norm(model.blocks(kept)))


def _joined(model: Any, tokens: Tensor) -> Tensor:
    """Virchow2's feature: class token and mean of the patches."""
    return torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(dim=1)], dim=1)


def _of_timm(name: str, build: Callable[..., nn.Module] = timm_vit, **arguments: Any) -> Family:
    return Family(f"timm {name}", partial(build, **arguments), from_timm, lambda model, x: model(x), _timm_kept)


def timm_eva(size: Size, **arguments: Any) -> nn.Module:
    import timm

    common = {"img_size": size.img_size, "patch_size": size.patch_size, "embed_dim": size.dim}
    common |= {"depth": size.depth, "num_heads": size.heads, "num_classes": size.classes}
    return timm.create_model("vit_small_patch16_dinov3", **{**common, **arguments})


def timm_eva02(size: Size, **arguments: Any) -> nn.Module:
    import timm

    common = {"img_size": size.img_size, "patch_size": size.patch_size, "embed_dim": size.dim, "ref_feat_shape": (3, 5)}
    common |= {"depth": size.depth, "num_heads": size.heads, "num_classes": size.classes, "dynamic_img_size": True}
    model = timm.create_model("eva02_tiny_patch14_224", **{**common, **arguments})
    # Cosines in the precision of the comparison, which timm rounds to float32.
    model.rope.get_embed = partial(model.rope.get_embed, dtype=torch.float64)
    return model


def _eva_kept(model: Any, x: Tensor, keep_N: Tensor) -> Tensor:
    tokens, rope = model._pos_embed(model.patch_embed(x))
    prefix = torch.ones(model.num_prefix_tokens, dtype=torch.bool)
    tokens = tokens[:, torch.cat([prefix, keep_N])]
    for block in model.blocks:
        tokens = block(tokens, rope=rope[keep_N])
    return model.forward_head(model.norm(tokens))


def _of_eva(name: str, build: Callable[..., nn.Module] = timm_eva, **arguments: Any) -> Family:
    return Family(f"timm {name}", partial(build, **arguments), from_timm, lambda model, x: model(x), _eva_kept)


_VIRCHOW2 = Family(
    "timm Virchow2-like, class token and mean",
    partial(_swiglu_packed, reg_tokens=4, global_pool="", num_classes=0, dynamic_img_size=True),
    partial(from_timm, global_pool="token_avg"),
    lambda model, x: _joined(model, model(x)),
    lambda model, x, keep: _joined(model, _timm_kept(model, x, keep)),
)

TIMM = [
    _of_timm("ViT"),
    _of_timm("DeiT-3-like", no_embed_class=True, init_values=1e-6),
    _of_timm("ViT, mean pool", global_pool="avg"),
    _of_timm("ViT, mean pool, no class token", global_pool="avg", class_token=False),
    _of_timm("ViT, norm after the class token", fc_norm=True),
    _of_timm("DINOv2 with registers", reg_tokens=4, no_embed_class=True, init_values=1e-5, dynamic_img_size=True),
    _of_timm("UNI2-h-like", _swiglu_packed, reg_tokens=8, no_embed_class=True, dynamic_img_size=True, num_classes=0),
    _of_timm("H-optimus-like", _swiglu_packed, reg_tokens=4, num_classes=0),
    _VIRCHOW2,
    _of_timm("SwiGLU", _swiglu),
    _of_timm("SigLIP-like, attention pool", class_token=False, global_pool="map"),
    _of_timm("attention pool with prefix", reg_tokens=2, global_pool="map"),
    _of_timm("CLIP-like", pre_norm=True, act_layer="quick_gelu"),
    _of_timm("q/k norm", qk_norm=True),
    _of_timm("norms inside", scale_attn_norm=True, scale_mlp_norm=True),
    _of_timm("few biases", qkv_bias=False, proj_bias=False, act_layer="gelu_tanh"),
    _of_timm("no positions, no norm", pos_embed="none", final_norm=False),
]


def _hf(size: Size, kind: str, model: str = "Model", **arguments: Any) -> nn.Module:
    import transformers

    common = {"image_size": size.img_size, "patch_size": size.patch_size, "hidden_size": size.dim}
    common |= {"num_hidden_layers": size.depth, "num_attention_heads": size.heads, "num_labels": size.classes}
    if kind in ("ViT", "IJepa", "DINOv3ViT"):
        common["intermediate_size"] = 4 * size.dim
    config = getattr(transformers, f"{kind}Config")(**{**common, **arguments})
    return getattr(transformers, f"{kind}{model}")(config)


def _hf_output(model: Any, x: Tensor) -> Tensor:
    result = model(x)
    return result.logits if hasattr(result, "logits") else _hf_pool(model, result.last_hidden_state)


def _hf_pool(model: Any, tokens: Tensor) -> Tensor:
    mean = model.config.model_type == "ijepa"
    if not hasattr(model, "classifier"):
        return tokens.mean(dim=1) if mean else tokens[:, 0]
    pooled = tokens.mean(dim=1) if mean else tokens[:, 0]
    if model.config.model_type.startswith("dinov2"):
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        pooled = torch.cat([pooled, tokens[:, prefix:].mean(dim=1)], dim=1)
    return model.classifier(pooled)


def _hf_kept(model: Any, x: Tensor, keep_N: Tensor) -> Tensor:
    backbone = model if hasattr(model, "embeddings") else getattr(model, model.base_model_prefix)
    tokens = backbone.embeddings(x)
    prefix = torch.ones(tokens.shape[1] - len(keep_N), dtype=torch.bool)
    tokens, extra = tokens[:, torch.cat([prefix, keep_N])], {}
    if hasattr(backbone, "rope_embeddings"):
        extra["position_embeddings"] = tuple(part[keep_N] for part in backbone.rope_embeddings(x))
    owner = next(part for part in (backbone, *backbone.children()) if hasattr(part, "layers") or hasattr(part, "layer"))
    for layer in getattr(owner, "layers", None) or owner.layer:
        tokens = layer(tokens, **extra)
    norm = backbone.norm if hasattr(backbone, "norm") else backbone.layernorm
    return _hf_pool(model, norm(tokens))


def _of_hf(name: str, kind: str, model: str = "Model", **arguments: Any) -> Family:
    return Family(
        f"transformers {name}",
        partial(_hf, kind=kind, model=model, **arguments),
        from_transformers,
        _hf_output,
        _hf_kept,
    )


_HEAD = "ForImageClassification"
TRANSFORMERS = [
    _of_hf("ViT", "ViT"),
    _of_hf("ViT, classifier", "ViT", _HEAD),
    _of_hf("DINOv2", "Dinov2"),
    _of_hf("DINOv2, SwiGLU", "Dinov2", use_swiglu_ffn=True),
    _of_hf("DINOv2, classifier", "Dinov2", _HEAD),
    _of_hf("DINOv2 with registers", "Dinov2WithRegisters", num_register_tokens=4),
    _of_hf("DINOv2 with registers, classifier", "Dinov2WithRegisters", _HEAD, num_register_tokens=4),
    _of_hf("DINOv3-ViT", "DINOv3ViT", num_register_tokens=4),
    _of_hf("DINOv3-ViT, gated", "DINOv3ViT", use_gated_mlp=True, hidden_act="silu", num_register_tokens=2),
    _of_hf("DINOv3-ViT, no registers", "DINOv3ViT", key_bias=True),
    _of_hf("I-JEPA", "IJepa"),
    _of_hf("I-JEPA, classifier", "IJepa", _HEAD),
]

EVA = [
    _of_eva("DINOv3, mean pool"),
    _of_eva("DINOv3, class token", global_pool="token", qkv_bias=True),
    _of_eva("DINOv3, gated, q/k norm", global_pool="token", swiglu_mlp=True, qk_norm=True),
    _of_eva("DINOv3, aligned SwiGLU", global_pool="token", swiglu_mlp=True, swiglu_align_to=8, use_fc_norm=True),
    _of_eva("DINOv3, learnt positions besides", use_abs_pos_emb=True),
    _of_eva("DINOv3, rotated as EVA-02", rope_rotate_half=False),
    _of_eva("EVA-02", timm_eva02),
    _of_eva("EVA-02, separate projections, inner norm", timm_eva02, qkv_fused=False, scale_attn_inner=True),
    _of_eva("EVA-02, q/k norm, class token", timm_eva02, qk_norm=True, global_pool="token", use_fc_norm=False),
    _of_eva("EVA-02, columns first, no reference", timm_eva02, rope_grid_indexing="xy", ref_feat_shape=None),
    _of_eva("EVA-02, offset, no learnt positions", timm_eva02, rope_grid_offset=1.0, use_abs_pos_emb=False),
]

FAMILIES = TIMM + EVA + TRANSFORMERS
