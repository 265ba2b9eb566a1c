"""An attention implementation for Hugging Face transformers, and the conversion of its vision encoders.

The attention implementation masks keys in any bidirectional encoder and leaves the rest of the model as it is. A
converted model is packed after the patch embedding, so that background skips MLPs and norms too.

Dimension key: B sequences, N tokens of each, H heads, D head width, C channels.
"""

from __future__ import annotations

import re
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskattn.attention.api import masked_attention, packed_attention
from maskattn.nn.adapters.clip import CLIP_FAMILIES, from_clip
from maskattn.nn.adapters.conversion import build, refuse
from maskattn.nn.adapters.siglip import SIGLIP_FAMILIES, from_siglip
from maskattn.nn.vit import VisionTransformer

__all__ = ["attend", "from_transformers", "position_convention", "register_attention"]

_FAMILIES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa")
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"} | {
    name: name for name in ("quick_gelu", "relu", "silu")
}

_LAYER = re.compile(r"^(?:encoder\.layer|model\.layer|layers|layer)\.(\d+)\.(.+)$")
# Names in transformers 5 and 4, and ours; q, k and v are concatenated afterwards.
_IN_LAYER = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^(?:layernorm_before|norm1)\.", "norm1."),
        (r"^(?:layernorm_after|norm2)\.", "norm2."),
        (r"^attention\.(?:attention\.query|q_proj)\.", "attn.q."),
        (r"^attention\.(?:attention\.key|k_proj)\.", "attn.k."),
        (r"^attention\.(?:attention\.value|v_proj)\.", "attn.v."),
        (r"^attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
        (r"^layer_scale([12])\.lambda1$", r"ls\1.gamma"),
        (r"^(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
        (r"^(?:output\.dense|mlp\.fc2|mlp\.down_proj|mlp\.weights_out)\.", "mlp.fc2."),
        (r"^mlp\.gate_proj\.", "mlp.fc1_g."),
        (r"^mlp\.weights_in\.", "mlp.fc1."),
    )
]
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
# Parameters that only pre-training reads, or that do not affect the features.
_LEFT_OUT = re.compile(r"^(?:embeddings\.mask_token|pooler\.|rope_embeddings\.)")


def from_transformers(
    model: nn.Module, *, global_pool: str | None = None, impl: str | None = None, copy: bool = True
) -> VisionTransformer:
    """Convert a transformers encoder into ours; outputs are the same in eval mode.

    With a classifier the output is its logits. Without one it is the class token after the last norm,
    ``last_hidden_state[:, 0]``, or the mean of all tokens for I-JEPA, which has no class token; ``forward_features``
    returns ``last_hidden_state``. ViT's pooler (a dense layer and tanh after the class token) is dropped. Weights are
    copied, unless ``copy=False``; device, dtype and mode are kept. DINOv3's random shifts of positions in training are
    not applied.

    Args:
        model: ViT, DINOv2, DINOv2 with registers, DINOv3-ViT or I-JEPA, with or without its ``ForImageClassification``
            head; CLIP, of which the image tower is taken, with its projection as the head; or SigLIP, of which the
            image tower is taken, with its attention pooling.
        global_pool: pooling that replaces the default of an encoder without a classifier: "token", "avg" (mean of the
            patches), "token_avg" or "" (every token).
        impl: implementation of the attention; None takes the best.
        copy: whether the weights are copied; False shares them with ``model``, which must not be used afterwards. Only
            q, k and v, which are concatenated, then take memory twice until ``model`` is released.

    Raises:
        UnsupportedModelError: a ValueError that names every component without a counterpart in ours.
        TypeError: ``model`` is no transformers model.

    Example:
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> dino = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
        >>> from_transformers(dino)(torch.randn(1, 3, 224, 224), keep=torch.ones(1, 16, 16, dtype=torch.bool)).shape
        torch.Size([1, 64])
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise TypeError(
            f"from_transformers takes a transformers model, got {type(model).__name__}; to load one by name use "
            "maskattn.nn.load_vit"
        )
    kind = type(model).__name__
    if getattr(config, "model_type", None) in CLIP_FAMILIES:
        if global_pool is not None:
            refuse(kind, [f"the pooling of CLIP's image tower is its class token, got global_pool={global_pool!r}"])
        return from_clip(model, impl=impl, copy=copy)
    if getattr(config, "model_type", None) in SIGLIP_FAMILIES:
        return from_siglip(model, global_pool=global_pool, impl=impl, copy=copy)
    refuse(kind, _unknown_parts(model))
    backbone, head = _backbone_and_head(model)
    state = _rename(backbone.state_dict())
    if head is not None:
        state |= {f"head.{name}": x for name, x in head.state_dict().items()}
    arguments = _arguments(config, state, head)
    if global_pool is not None:
        if head is not None:
            refuse(kind, [f"it has a classifier, trained on {arguments['global_pool']!r}, got {global_pool!r}"])
        arguments["global_pool"] = global_pool
    if config.model_type == "dinov2_with_registers":
        # Registers are inserted after positions are added, so the class token absorbs its own position.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    depth = arguments["depth"]
    drop_paths = [float(getattr(config, "drop_path_rate", 0.0))] * depth
    return build(kind, arguments, state, drop_paths=drop_paths, training=model.training, impl=impl, copy=copy)


def _backbone_and_head(model: Any) -> tuple[Any, nn.Linear | None]:
    if hasattr(model, "embeddings"):
        return model, None
    head = model.classifier
    return getattr(model, model.base_model_prefix), None if isinstance(head, nn.Identity) else head


def _unknown_parts(model: Any) -> list[str]:
    config = model.config
    if config.model_type not in _FAMILIES:
        return [
            f"model type {config.model_type!r} is none of {', '.join((*_FAMILIES, *CLIP_FAMILIES, *SIGLIP_FAMILIES))}"
        ]
    if not hasattr(model, "embeddings") and not hasattr(model, "classifier"):
        return ["only the encoder and its ForImageClassification are known"]
    if type(model).__name__.endswith("Backbone"):
        return ["a Backbone returns feature maps; convert the Model instead"]
    unknown = []
    if not isinstance(config.patch_size, int) and len(set(config.patch_size)) > 1:
        unknown.append(f"patch_size={tuple(config.patch_size)}, not square")
    if config.hidden_act not in _ACTIVATIONS:
        unknown.append(f"activation {config.hidden_act!r}")
    if model.training and getattr(config, "hidden_dropout_prob", 0.0) > 0:
        unknown.append(f"hidden_dropout_prob={config.hidden_dropout_prob} in training; convert the model in eval mode")
    return unknown


def _rename(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict to our keys and concatenate q, k and v; an unknown key is kept and is refused later."""
    up = "mlp.fc1_x." if any("mlp.gate_proj." in name for name in theirs) else "mlp.fc1."
    ours: dict[str, Tensor] = {}
    for name, x in theirs.items():
        if _LEFT_OUT.match(name):
            continue
        in_layer = _LAYER.match(name)
        if in_layer is None:
            ours[_OUTSIDE.get(name, name)] = x
            continue
        inner = in_layer[2].replace("mlp.up_proj.", up)
        for pattern, replacement in _IN_LAYER:
            inner = pattern.sub(replacement, inner)
        ours[f"blocks.{in_layer[1]}.{inner}"] = x
    return _join_projections(ours)


def _join_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate q, k and v into one layer, with zeros for a missing bias."""
    for name in [name for name in state if name.endswith("attn.q.weight")]:
        layer = name.removesuffix("q.weight")
        weights = [state.pop(f"{layer}{which}.weight") for which in "qkv"]
        biases = [state.pop(f"{layer}{which}.bias", None) for which in "qkv"]
        state[f"{layer}qkv.weight"] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            state[f"{layer}qkv.bias"] = torch.cat(
                [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
            )
    return state


def _arguments(config: Any, state: dict[str, Tensor], head: nn.Linear | None) -> dict[str, Any]:
    size, patch = config.image_size, config.patch_size
    mlp = "blocks.0.mlp."
    gate = state.get(f"{mlp}fc1_g.weight")
    hidden, fc2 = state[f"{mlp}fc1.weight"] if gate is None else gate, state[f"{mlp}fc2.weight"]
    packed = gate is None and fc2.shape[1] * 2 == len(hidden)
    kind = config.model_type
    pool = {"ijepa": "avg"}.get(kind, "token")
    if head is not None and kind.startswith("dinov2"):
        pool = "token_avg"
    class_token = "cls_token" in state
    # transformers represents the absence of registers by a tensor without rows.
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if not registers:
        state.pop("reg_token", None)
    rotary = kind == "dinov3_vit"
    gated_act = "silu" if kind.startswith("dinov2") else _ACTIVATIONS[config.hidden_act]
    return {
        "img_size": size if isinstance(size, int) else tuple(size),
        "patch_size": patch if isinstance(patch, int) else patch[0],
        "in_chans": config.num_channels,
        "num_classes": 0 if head is None else head.out_features,
        "global_pool": pool,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        # The extra half feature makes int(dim · ratio) this width, however the division rounds.
        "mlp_ratio": (len(hidden) + 0.5) / config.hidden_size,
        "mlp_layer": "swiglu_packed" if packed else "mlp" if gate is None else "swiglu",
        "act_layer": gated_act if packed or gate is not None else _ACTIVATIONS[config.hidden_act],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token,
        "reg_tokens": registers,
        "no_embed_class": kind in ("dinov2_with_registers", "ijepa"),
        "fc_norm": False,
        "pos_embed": "rotary" if rotary else "learn",
        "rope_theta": config.rope_theta if rotary else 100.0,
        "pos_embed_resample": position_convention(kind),
        "attn_drop_rate": getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0)),
        "norm_eps": config.layer_norm_eps,
    }


def position_convention(model_type: str) -> str:
    """Return the convention by which transformers resamples the learnt positions of a ``config.model_type``.

    Only DINOv2 with registers is antialiased. DINOv2's original code has a third convention for models without
    registers, so that the same weights give different features in each library (:mod:`maskattn.nn.positions`).
    """
    return "timm" if model_type == "dinov2_with_registers" else "transformers"


def register_attention(name: str = "maskattn") -> str:
    """Register ``attn_implementation="maskattn"`` with transformers, for bidirectional encoders.

    A 2-D ``attention_mask`` (B, N) leaves masked keys out instead of adding −inf to their scores; without one every
    token attends to every token, through our kernels. Registering again changes nothing.

    Args:
        name: the name to register.

    Returns:
        The name.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
        >>> config._attn_implementation = register_attention()
        >>> ViTModel(config)(torch.randn(1, 3, 224, 224)).last_hidden_state.shape
        torch.Size([1, 197, 64])
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _keep_2d_mask)
    return name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature that transformers expects of an attention function.

    Args:
        module: the attention layer.
        query, key, value: (B, H, N, D).
        attention_mask: (B, N), true or 1 where a key takes part; None for all keys.
        dropout: probability of dropping a weight.
        scaling: factor of the scores; None takes 1/√D.
        is_causal: refused if true; None takes ``module.is_causal``.
        options: further options of the layer; those that change the result are refused (position_bias, softcap,
            sliding_window, s_aux).

    Returns:
        The attended values (B, N, H, D), and None instead of the weights.

    Raises:
        ValueError: the layer uses an option that is not supported, or a mask that is not (B, N).
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    wanted = [name for name in ("position_bias", "softcap", "sliding_window", "s_aux") if options.get(name) is not None]
    wanted += ["causal attention"] if causal else []
    wanted += ["grouped queries"] if key.shape[1] != query.shape[1] else []
    wanted += ["output_attentions"] if options.get("output_attentions") or _weights_are_collected() else []
    if wanted:
        raise ValueError(
            f"attn_implementation='maskattn' does not support {', '.join(wanted)}, got a call with it from "
            f"{type(module).__name__}; use 'sdpa' or 'eager' for this model"
        )
    if attention_mask is None:
        B, N = query.shape[0], query.shape[2]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        starts_q, starts_k = (
            torch.arange(0, B * n + 1, n, device=query.device, dtype=torch.int32) for n in (N, key.shape[2])
        )
        out = packed_attention(q, k, v, starts_q, starts_k, N, key.shape[2], scale=scaling, dropout_p=dropout)
        return cast(Tensor, out).unflatten(0, (B, N)), None
    if attention_mask.ndim != 2:
        raise ValueError(
            "attn_implementation='maskattn' masks only keys and takes an attention_mask of shape (B, N), got "
            f"{tuple(attention_mask.shape)}; use 'sdpa' for masks that differ between queries"
        )
    keep = attention_mask.bool()
    dense = masked_attention(query, key, value, keep, scale=scaling, dropout_p=dropout, skip_queries=False)
    return cast(Tensor, dense).transpose(1, 2), None


def _weights_are_collected() -> bool:
    """Return whether attention weights were requested of the model; SigLIP, for one, does not pass that on."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    collected = None if collector is None else collector.get()
    return collected is not None and "attentions" in collected


def _keep_2d_mask(*_: Any, mask_function: Any = None, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Pass the caller's (B, N) mask to :func:`attend` unchanged."""
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function not in (None, bidirectional_mask_function):
        raise ValueError(
            "attn_implementation='maskattn' supports only bidirectional encoders, got a model that masks its scores by "
            f"{getattr(mask_function, '__name__', mask_function)}; use 'sdpa' or 'eager' for it"
        )
    return attention_mask
