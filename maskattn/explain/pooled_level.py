"""Relevance of a slide's regions that are pooled by gated attention, from the gradient of the entire slide level:

    r_rc = z_r · γ_rc,

where γ is the gradient of logit f_c at embedding z_r, or, for a complete method, its mean along the path from 0 to z,
so that Σ_r r_rc = f_c(z) − f_c(0) up to the error of the quadrature. All other methods use this product at this level,
because they read the last block of a ViT, which does not exist here.

Dimension key: K classes, T kept regions, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.hierarchical import LevelMethod, RelevanceMap, SumOfMap, path_sum
from maskattn.explain.packed_model import check_explainable
from maskattn.nn.region_model import RegionModel
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.shapes import Bool, Float

__all__ = ["explain_pooled_slide"]


@torch.inference_mode(False)
def explain_pooled_slide(
    model: RegionModel, level: LevelMethod, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]
) -> RelevanceMap:
    """Run pass 1 over regions that are pooled; the attention is that of the pooling.

    Args:
        model: a model in eval mode, with a :class:`HIPTHead`.
        level: the method.
        embeddings_TC: (T, C), a row for each kept region.
        keep_HW: (H, W) bool over the slide's regions.

    Raises:
        ValueError: dropout is active (train mode), or embeddings and kept regions do not match.
    """
    check_explainable(model)
    slide_level = model.slide_encoder
    assert isinstance(slide_level, HIPTHead), "a ViT is explained at its last block"
    z = embeddings_TC.detach().clone()
    found = level.path(lambda at: model(at, keep_HW), z)
    with torch.no_grad():
        logits_K, attention_T = model(z, keep_HW), slide_level.attention(z)[0]
    sums = SumOfMap(found.difference_K, torch.zeros_like(logits_K), found.gap_K) if level.method.complete else None
    return RelevanceMap(logits_K, found.products_KT, attention_T, found.gradient_KTC, sums, path_sum(found))
