"""Tokens of a slide's regions, where an encoder of regions stands in the place of an encoder of tiles.

Relevance is that of :mod:`maskattn.explain.three_levels`. Attention is the factorised map of the two levels of a
region, patch and region ViT; the slide level's weights are the regions' own.

Dimension key: B regions, (h, w) their tokens, K classes, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.factorised import FactorisedAttention
from maskattn.explain.hierarchical import LevelMethod, TokenMaps
from maskattn.explain.three_levels import explain_pixel_regions
from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["explain_region_tokens"]


def explain_region_tokens(
    encoder: RegionEncoder,
    level: LevelMethod,
    regions_BIXY: UInt8[Tensor, "B 3 X Y"],
    keep_Bhw: Bool[Tensor, "B h w"] | None,
    gradient_KBC: Float[Tensor, "K B C"],
) -> TokenMaps:
    """The maps of some regions' tokens.

    Args:
        encoder: in eval mode.
        level: the method.
        regions_BIXY: (B, 3, region_px, region_px) uint8, RGB.
        keep_Bhw: (B, h, w) bool over their tokens; None keeps all.
        gradient_KBC: the gradient of the slide's logits at the regions' embeddings.

    Raises:
        ValueError: the model drops at random (train mode).
    """
    maps = explain_pixel_regions(encoder.levels, level, regions_BIXY, keep_Bhw, gradient_KBC)
    none_B = torch.zeros(len(regions_BIXY), dtype=gradient_KBC.dtype, device=gradient_KBC.device)
    attention = FactorisedAttention(encoder.levels).regions(regions_BIXY, keep_Bhw, none_B)
    return TokenMaps(maps.tokens_KBhw, attention.combined_Bhw, maps.unmapped_KB)
