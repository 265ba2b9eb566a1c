"""Checkpoints of HIPT and soma: a region ViT with the slide level above it, or the slide level alone.

Keys: ``vit_region.*`` (in checkpoints of the local model), ``global_phi.0``, ``global_transformer.layers.i``,
``global_attn_pool.attention_{a,b}.0``, ``global_attn_pool.attention_c``, ``global_rho.0``, ``classifier``. A checkpoint
never contains the patch ViT, which is frozen and has its weights in a file of its own.

Source: clemsgrs/hipt, commit 648ec04 (``src/models/hipt.py``: LocalHIPT, GlobalHIPT).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskattn.nn.adapters.conversion import UnsupportedModelError
from maskattn.nn.checkpoints import from_state_dict, load_vit
from maskattn.nn.hipt import HEADS, HIPT
from maskattn.nn.region_model import RegionModel
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.slide_models.layouts import head_from_checkpoint
from maskattn.nn.slide_models.reading import read_checkpoint, tensors_of
from maskattn.nn.vit import VisionTransformer

__all__ = ["hipt_from_state_dict", "load_hipt"]

# That code resamples positions to the exact size, where DINO and the original HIPT shift them by 0.1 token.
_RESAMPLE = "transformers"


def load_hipt(
    checkpoint: str | Path,
    patch_encoder: VisionTransformer | None = None,
    *,
    region_weights: str | Path | None = None,
    num_heads: int = HEADS,
    impl: str | None = None,
    **arguments: Any,
) -> RegionModel:
    """Load a checkpoint that HIPT or soma trained; no code in the file is run.

    Args:
        checkpoint: a file of the local model (``vit_region.*`` and the slide level) or the global (the slide level).
        patch_encoder: the ViT whose embeddings the region ViT reads; None if they come from files.
        region_weights: the weights of the region ViT (``vit4k_xs_dino.pth``), for a checkpoint of the global model.
        num_heads: the number of heads of the region ViT.
        impl: the implementation of attention; None takes the best.
        arguments: arguments of :class:`HIPT` (``patch_px``, ``pixel_mean``, ``pixel_std``).

    Returns:
        A :class:`HIPT` if there is a patch encoder, else the two upper levels; in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        UnsupportedModelError: a ValueError that names missing and unexpected keys and differing shapes.
        ValueError: the file is not a checkpoint, or its widths do not fit the patch encoder.
    """
    content = read_checkpoint(checkpoint)
    region = None
    if region_weights is not None:
        region = load_vit(region_weights, num_heads=num_heads, impl=impl, pos_embed_resample=_RESAMPLE)
    return hipt_from_state_dict(
        content, patch_encoder, region, name=str(checkpoint), num_heads=num_heads, impl=impl, **arguments
    )


def hipt_from_state_dict(
    checkpoint: Mapping[str, Any],
    patch_encoder: VisionTransformer | None = None,
    region_encoder: VisionTransformer | None = None,
    *,
    name: str = "the checkpoint",
    num_heads: int = HEADS,
    impl: str | None = None,
    **arguments: Any,
) -> RegionModel:
    """Build the model from a checkpoint's tensors. Other arguments and errors are those of :func:`load_hipt`.

    Args:
        checkpoint: a state dict, or a training checkpoint that holds one.
        region_encoder: the region ViT, for a checkpoint of the global model.
        name: the checkpoint's name in error messages.
    """
    state = tensors_of(checkpoint)
    of_region = {key.removeprefix("vit_region."): x for key, x in state.items() if key.startswith("vit_region.")}
    of_slide = {key: x for key, x in state.items() if not key.startswith("vit_region.")}
    if of_region and region_encoder is not None:
        raise ValueError(f"region weights are for a checkpoint without vit_region, got both in {name}; leave them out")
    slide_level = head_from_checkpoint(of_slide, name=name, impl=impl).head
    if not isinstance(slide_level, HIPTHead):
        raise UnsupportedModelError(
            f"a checkpoint of HIPT or soma must have global_phi.0.weight, got one of kind {slide_level.kind} in "
            f"{name}; load it with load_slide_head"
        )
    if of_region:
        region_encoder = from_state_dict(
            of_region, num_heads=num_heads, name=name, impl=impl, pos_embed_resample=_RESAMPLE
        )
    if region_encoder is None:
        raise ValueError(
            f"a checkpoint without vit_region needs the region ViT's own weights, got none for {name}; pass "
            "region_weights (vit4k_xs_dino.pth)"
        )
    dtype = slide_level.classifier.weight.dtype
    if patch_encoder is None:
        return RegionModel(region_encoder, slide_level).to(dtype).eval()
    return HIPT(patch_encoder, region_encoder, slide_level, **arguments).to(dtype).eval()
