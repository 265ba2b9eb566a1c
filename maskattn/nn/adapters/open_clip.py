"""Conversion of open_clip's and OpenAI's CLIP checkpoints: the image tower, with its projection as the head.

The projection maps into the shared image-text space. Checkpoints have one of three kinds of image tower:

- CLIP's own vision transformer (``visual.class_embedding``, ``visual.transformer.resblocks``): CLIP, PLIP, QuiltNet;
- a timm model (``visual.trunk``) followed by a linear projection (``visual.head.proj``): BiomedCLIP; or by attention
  pooling (``visual.attn_pool_contrast``): CONCH;
- towers that are refused, with the unsupported component named: ResNets, and attention pooling with several queries
  (CoCa).

The layouts follow model.py, transformer.py and timm_model.py of open_clip 2.

Dimension key: C channels of the tower, O dimensions of the shared space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskattn.nn.adapters.conch import has_conch_pool, pool_of_conch, without_caption_pool
from maskattn.nn.adapters.conversion import build, refuse, rename_layers
from maskattn.nn.vit import VisionTransformer

__all__ = ["from_open_clip", "has_clip_tower", "with_projection"]

_HEAD_WIDTH = 64  # open_clip's default
_LAYER = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_IN_LAYER = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_1.": "ls1.",
    "ls_2.": "ls2.",
}
_OUTSIDE = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    **{
        f"{theirs}.{suffix}": f"{ours}.{suffix}"
        for theirs, ours in (("ln_pre", "norm_pre"), ("ln_post", "norm"))
        for suffix in ("weight", "bias")
    },
}
_REFUSED = {
    "attn_pool": "attention pooling with several queries (CoCa)",
    "layer1.": "a ResNet as the image tower",
}


def has_clip_tower(keys: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of a CLIP whose image tower is its own vision transformer or a ResNet."""
    return any(key.endswith(("visual.class_embedding", "visual.layer1.0.conv1.weight")) for key in keys)


def from_open_clip(
    checkpoint: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    name: str = "the checkpoint",
    impl: str | None = None,
    **arguments: Any,
) -> VisionTransformer:
    """Convert the image tower of a CLIP checkpoint in open_clip's layout; its output is the embedding, not normalised.

    Args:
        checkpoint: state dict with ``visual.`` in the keys of the image tower; the text tower is ignored.
        num_heads: number of attention heads; None takes one per 64 channels, as open_clip does.
        name: the checkpoint's name in messages.
        impl: implementation of the attention; None takes the best.
        arguments: further arguments of :class:`VisionTransformer`. ``act_layer`` is required: "quick_gelu" for
            OpenAI's weights and models fine-tuned from them, "gelu" for others.

    Raises:
        UnsupportedModelError: a ValueError that names every component without a counterpart in ours.
        ValueError: ``act_layer`` is missing.
    """
    mark = next(key for key in checkpoint if key.endswith(("visual.class_embedding", "visual.layer1.0.conv1.weight")))
    prefix = mark[: mark.index("visual.") + len("visual.")]
    tower = {key.removeprefix(prefix): x for key, x in checkpoint.items() if key.startswith(prefix)}
    refuse(name, [what for prefix, what in _REFUSED.items() if any(key.startswith(prefix) for key in tower)])
    if "act_layer" not in arguments:
        raise ValueError(
            f"act_layer must be given, since open_clip's weights do not record it, got none for {name}; pass "
            "act_layer='quick_gelu' for OpenAI's weights and models fine-tuned from them, 'gelu' for others"
        )
    state = _rename(tower)
    if arguments.get("num_classes") == 0:
        state = {key: x for key, x in state.items() if not key.startswith("head.")}
    weight = state["patch_embed.proj.weight"]
    dim, in_chans, patch, _ = weight.shape
    inferred = {
        "img_size": round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "in_chans": in_chans,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": dim,
        "depth": 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0),
        "num_heads": num_heads or max(1, dim // _HEAD_WIDTH),
        "mlp_ratio": (len(state.get("blocks.0.mlp.fc1.weight", weight)) + 0.5) / dim,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "pre_norm": "norm_pre.weight" in state,
        "norm_eps": 1e-5,
    }
    return build(name, {**inferred, **arguments}, state, impl=impl).eval()


def with_projection(checkpoint: Mapping[str, Any], prefix: str, name: str) -> dict[str, Tensor]:
    """Return the layers after a timm tower (``visual.trunk.``) as the state of our pool and head; {} if there are none.

    Args:
        checkpoint: state dict of the complete model.
        prefix: prefix of the tower's keys.
        name: the checkpoint's name in messages.

    Raises:
        UnsupportedModelError: the tower is followed by layers other than a linear projection or CONCH's.
    """
    if not prefix.endswith("trunk."):
        return {}
    visual = prefix.removesuffix("trunk.")
    after_trunk = {key.removeprefix(visual): x for key, x in checkpoint.items() if key.startswith(visual)}
    after_trunk = without_caption_pool({key: x for key, x in after_trunk.items() if not key.startswith("trunk.")})
    if has_conch_pool(after_trunk):
        return pool_of_conch(after_trunk, visual, name)
    if not visual.endswith("visual."):
        return {}
    known = {"head.proj.weight": "head.weight", "head.proj.bias": "head.bias"}
    layers = sorted(
        {
            ".".join(key.split(".")[:2]) if key.startswith("head.") else key.split(".")[0]
            for key in after_trunk.keys() - known
        }
    )
    refuse(name, [f"{layer} between the image tower and the shared image-text space" for layer in layers])
    head = {known[key]: x for key, x in after_trunk.items()}
    if "head.weight" in head and "head.bias" not in head:
        head["head.bias"] = head["head.weight"].new_zeros(len(head["head.weight"]))
    return head


def _rename(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = rename_layers(tower, _LAYER, _IN_LAYER, _OUTSIDE)
    if "proj" in ours:
        ours["head.weight"] = ours.pop("proj").T.contiguous()
        ours["head.bias"] = torch.zeros_like(ours["head.weight"][:, 0])
    ours["cls_token"] = ours["cls_token"].view(1, 1, -1)
    ours["pos_embed"] = ours["pos_embed"][None]
    return ours
