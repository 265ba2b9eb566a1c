"""Tokens of a slide's regions, where an encoder of regions stands in the place of an encoder of tiles.

Relevance is that of :mod:`maskattn.explain.three_levels`, attention the factorised map of the three levels by ranks.

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
    """The share of a slide's tiles up to and with the first of equal attention, as the factorised map counts them."""
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
    """The maps of some regions' tokens.

    Args:
        encoder: in eval mode.
        level: the method.
        regions_BIXY: (B, 3, region_px, region_px) uint8, RGB.
        keep_Bhw: (B, h, w) bool over their tokens; None keeps all.
        gradient_KBC: the gradient of the slide's logits at the regions' embeddings.
        ranks_B: (B,) the ranks of the slide's attention to them; None counts none.

    Raises:
        ValueError: the model drops at random (train mode).
    """
    maps = explain_pixel_regions(encoder.levels, level, regions_BIXY, keep_Bhw, gradient_KBC)
    if ranks_B is None:
        ranks_B = torch.zeros(len(regions_BIXY), dtype=gradient_KBC.dtype, device=gradient_KBC.device)
    attention = FactorisedAttention(encoder.levels).regions(regions_BIXY, keep_Bhw, ranks_B)
    return TokenMaps(maps.tokens_KBhw, attention.combined_Bhw, maps.unmapped_KB)
