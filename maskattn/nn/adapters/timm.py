"""Conversion of timm's vision transformers: weights, names and outputs stay the same, and background costs nothing.

Every component of the model is examined. An unsupported one is refused by name and never skipped, so that a converted
model reproduces timm's outputs up to floating-point rounding.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from maskattn.nn.adapters.conversion import build, refuse
from maskattn.nn.adapters.timm_eva import eva_arguments, eva_state, own_name, unknown_in_eva
from maskattn.nn.adapters.timm_parts import activation_of, mlp_layer_of, shared_arguments
from maskattn.nn.vit import VisionTransformer

__all__ = ["from_timm"]


def from_timm(
    model: nn.Module, *, global_pool: str | None = None, impl: str | None = None, copy: bool = True
) -> VisionTransformer:
    """Convert a timm ``VisionTransformer`` into ours.

    Weights are copied, unless ``copy=False``; device, dtype, train or eval mode and frozen parameters are kept.
    ``dynamic_img_size`` becomes True: other image sizes resample the position embedding, as timm does with that option.

    Args:
        model: a ``timm.models.VisionTransformer``, or an ``Eva`` (EVA, EVA-02, DINOv3). Supported are models with and
            without class token, registers, LayerScale, SwiGLU, q/k norms, pre-norm and head, and the pools below.
        global_pool: pooling that replaces the model's: "token", "avg", "map", "token_avg" or ""; only for a model
            without a head. Virchow2, for instance, is used with class token and mean concatenated ("token_avg").
        impl: implementation of the attention; None takes the best.
        copy: whether the weights are copied; False shares them with ``model``, which must not be used afterwards.

    Raises:
        UnsupportedModelError: a ValueError that names every component without a counterpart in ours (other rotary or
            relative positions, distillation tokens, other blocks, norms or pools).
        TypeError: ``model`` is no ``nn.Module``.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=2)
        >>> from_timm(vit)(torch.randn(1, 3, 224, 224), keep=torch.ones(1, 14, 14, dtype=torch.bool)).shape
        torch.Size([1, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"from_timm takes a timm model, got {type(model).__name__}; to load one by name use maskattn.nn.load_vit"
        )
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    kind = type(model).__name__
    if type(model) not in (TimmVisionTransformer, Eva):
        refuse(
            kind,
            [
                "only timm.models.VisionTransformer itself and Eva are known, without relative positions or "
                "distillation tokens"
            ],
        )
    if type(model) is Eva:
        refuse(kind, unknown_in_eva(model))
        arguments, state = eva_arguments(model), eva_state(model)
    else:
        refuse(kind, _unknown_parts(model))
        arguments, state = _arguments(model), model.state_dict()
    if global_pool is not None:
        if not isinstance(model.head, nn.Identity):
            refuse(kind, [f"it has a head, trained on global_pool={model.global_pool!r}, got {global_pool!r}"])
        # The model's norm stays where it is, before or after the pooling.
        arguments = {**arguments, "global_pool": global_pool}
    trains = {own_name(name): parameter.requires_grad for name, parameter in model.named_parameters()}
    shares = [getattr(block.drop_path1, "drop_prob", 0.0) for block in cast(Any, model).blocks]
    ours = build(
        kind, arguments, state, trains=trains, drop_paths=shares, training=model.training, impl=impl, copy=copy
    )
    ours.pretrained_cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    return ours


def _arguments(model: Any) -> dict[str, Any]:
    block = model.blocks[0]
    registers = model.reg_token
    return {
        **shared_arguments(model),
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "norm_eps": next(m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)),
    }


def _unknown_parts(model: Any) -> list[str]:
    """Describe the components of this model that ours does not support."""
    from timm.layers import AttentionPoolLatent, LayerNorm, PatchEmbed

    unknown = []
    if type(model.patch_embed) is not PatchEmbed:
        return [f"patch embedding {type(model.patch_embed).__name__}"]
    patch = model.patch_embed
    if patch.patch_size[0] != patch.patch_size[1]:
        unknown.append(f"patch_size={tuple(patch.patch_size)}, not square")
    if patch.dynamic_img_pad:
        unknown.append("dynamic_img_pad=True: pad the images yourself")
    if not isinstance(patch.norm, nn.Identity):
        unknown.append("a norm in the patch embedding (embed_norm_layer)")
    if (patch.proj.bias is None) != (not isinstance(model.norm_pre, nn.Identity)):
        unknown.append("a patch embedding with both a bias and pre_norm, or with neither")
    if not isinstance(model.patch_drop, nn.Identity):
        unknown.append("patch_drop_rate: drop tokens with maskattn.nn.drop_random_tokens instead")
    if model.global_pool not in ("token", "avg", "map", ""):
        unknown.append(f"global_pool={model.global_pool!r}")
    if model.pool_include_prefix:
        unknown.append("pool_include_prefix=True")
    if model.attn_pool is not None and not (
        type(model.attn_pool) is AttentionPoolLatent
        and model.attn_pool.latent_len == 1
        and model.attn_pool.pos_embed is None
        and isinstance(model.attn_pool.q_norm, nn.Identity)
    ):
        unknown.append(f"attention pool {type(model.attn_pool).__name__}")
    if type(model.head) not in (nn.Linear, nn.Identity):
        unknown.append(f"head {type(model.head).__name__}")
    norms = {type(m) for m in model.modules() if "norm" in type(m).__name__.lower()}
    unknown += [f"norm layer {kind.__name__}" for kind in norms - {nn.LayerNorm, LayerNorm}]
    epsilons = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    if len(epsilons) > 1:
        unknown.append(f"norms with different eps: {sorted(epsilons)}")
    if (
        len({(b.attn.num_heads, activation_of(b.mlp), b.attn.attn_drop.p) for b in model.blocks if hasattr(b, "attn")})
        > 1
    ):
        unknown.append("blocks that differ in heads, activation or dropout")
    for block in model.blocks:
        unknown += [part for part in _unknown_in_block(block, model.embed_dim) if part not in unknown]
    return unknown


def _unknown_in_block(block: Any, dim: int) -> list[str]:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    if type(block) is not Block:
        return [f"block {type(block).__name__}"]
    if type(block.attn) is not Attention:
        return [f"attention {type(block.attn).__name__}"]
    unknown = []
    if block.attn.attn_dim != dim or block.attn.proj.out_features != dim:
        unknown.append(f"attention of width {block.attn.attn_dim} in tokens of width {dim}")
    if getattr(block.attn, "gate", None) is not None:
        unknown.append("gated attention")
    if mlp_layer_of(block.mlp) is None:
        unknown.append(f"MLP {type(block.mlp).__name__}")
    if activation_of(block.mlp) is None:
        unknown.append(f"activation {type(block.mlp.act).__name__}")
    return unknown
