"""Token maps of a slide's regions, for models whose tile encoder is a region encoder.

Relevance is computed as in :mod:`maskattn.explain.three_levels`. Attention is the factorised map of the three levels,
scaled by ranks.

Dimension key: B regions, (h, w) their tokens, K classes, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.factorised import FactorisedAttention, normalise
from maskattn.explain.hierarchical import LevelMethod, TokenMaps
from maskattn.explain.three_levels import explain_pixel_regions
from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.packing import Packing
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["attention_ranks", "explain_region_tokens"]


def attention_ranks(attention_T: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """Return (T,) ranks of the attention to a slide's tiles divided by T, ties taking their lowest rank."""
    packing = Packing.from_keep(torch.ones(1, len(attention_T), dtype=torch.bool, device=attention_T.device))
    return normalise(attention_T, packing, "rank")


def explain_region_tokens(
    encoder: RegionEncoder,
    level: LevelMethod,
    regions_BIXY: UInt8[Tensor, "B 3 X Y"],
    keep_Bhw: Bool[Tensor, "B h w"] | None,
    gradient_KBC: Float[Tensor, "K B C"],
    ranks_B: Float[Tensor, "B"] | None = None,
) -> TokenMaps:
    """Compute the token maps of some regions.

    Args:
        encoder: the region encoder, in eval mode.
        level: the method.
        regions_BIXY: (B, 3, region_px, region_px) uint8, RGB.
        keep_Bhw: (B, h, w) bool over their tokens; None keeps all.
        gradient_KBC: (K, B, C), the gradient of the slide's logits at the regions' embeddings.
        ranks_B: (B,), the ranks of the slide's attention to them; None counts them as 0.

    Raises:
        ValueError: dropout is active (train mode).
    """
    maps = explain_pixel_regions(encoder.levels, level, regions_BIXY, keep_Bhw, gradient_KBC)
    if ranks_B is None:
        ranks_B = torch.zeros(len(regions_BIXY), dtype=gradient_KBC.dtype, device=gradient_KBC.device)
    attention = FactorisedAttention(encoder.levels).regions(regions_BIXY, keep_Bhw, ranks_B)
    return TokenMaps(maps.tokens_KBhw, attention.combined_Bhw, maps.unmapped_KB)
