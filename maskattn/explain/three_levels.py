"""Hierarchical CDAM on three levels: relevance of a slide's regions, of their patches, and of the patches' tokens.

Pass 1 is that of two levels: the regions' relevance and the gradient γ_rc of slide logit f_c at region embedding z_r.
Pass 2 explains the score z_r·γ_rc in a region, γ held fixed: first its patches at the region encoder, whose gradient
δ_pc at the patch embeddings e_p then gives the tokens' score e_p·δ_pc. With CDAM it is the exact chain rule twice over;
a complete method takes its path at every level, with γ and δ the means of gradients along the paths of the embeddings,
and says what is on no token. The graphs that are held are the region encoder's over some regions and the tail of some
patches' last block.

Dimension key: K classes, T kept regions or patches, B regions of a batch, n·m patches and h·w tokens of a region,
s·s tokens of a patch, C channels, H·W regions of the slide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskattn.explain.explainer import as_maps
from maskattn.explain.factorised import join_patches
from maskattn.explain.hierarchical import LevelMethod, RelevanceMap, explain_slide, products_with, unmapped
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.explain.packed_model import check_explainable
from maskattn.explain.pooled_level import explain_pooled_slide
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.hipt import HIPT, PixelRegions, RegionPatches
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.shapes import Bool, Float, Shaped

__all__ = ["RegionMaps", "ThreeLevelCDAM", "explain_pixel_regions"]


@dataclass(frozen=True)
class RegionMaps:
    """What pass 2 says of B regions; 0 at background.

    Attributes:
        patches_KBnm: (K, B, n, m), signed scores of the patches for the slide's classes.
        tokens_KBhw: (K, B, h, w), signed scores of their tokens.
        unmapped_KB: (K, B), the part of z_r·γ_rc that is on no token: what the class tokens and registers of region
            and patches account for, and the scores with which the paths begin; None where the method promises no sum.
    """

    patches_KBnm: Float[Tensor, "K B n m"]
    tokens_KBhw: Float[Tensor, "K B h w"]
    unmapped_KB: Float[Tensor, "K B"] | None = None


class ThreeLevelCDAM:
    """Explanations of a HIPT, for all its classes at once.

    Args:
        model: in eval mode.
        method: of :data:`maskattn.explain.METHODS`, one that explains slide models; "cdam" is the paper's.
        options: of the method (``m``).

    Raises:
        ValueError: there is no such method for slide models.
    """

    def __init__(self, model: HIPT, method: str = DEFAULT_METHOD, **options: Any) -> None:
        self.model = model
        self.level = LevelMethod.named(method, model.patch_encoder, **options)

    def slide(
        self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"], *, gradient: bool = True
    ) -> RelevanceMap:
        """Pass 1: the slide's logits and the relevance of each region.

        Args:
            embeddings_TC: (T, C) from ``model.encode_regions``, row-major.
            keep_HW: (H, W) bool over the slide's regions.
            gradient: also take the gradient that pass 2 needs.
        """
        if isinstance(self.model.slide_encoder, HIPTHead):
            return explain_pooled_slide(self.model, self.level, embeddings_TC, keep_HW)
        return explain_slide(self.model, self.level, embeddings_TC, keep_HW, gradient)

    def regions(
        self,
        regions_BIXY: Shaped[Tensor, "B I X Y"],
        keep_Bhw: Bool[Tensor, "B h w"] | None,
        gradient_KBC: Float[Tensor, "K B C"],
        *,
        batch_size: int = 64,
    ) -> RegionMaps:
        """Pass 2: the relevance of each patch and token of some regions.

        Args:
            regions_BIXY, keep_Bhw: as ``model.encode_regions`` takes them.
            gradient_KBC: these regions' part of :attr:`RelevanceMap.gradient_KTC`; anything for those without tissue.
            batch_size: patches in the patch encoder at a time.

        Raises:
            ValueError: the model drops at random (train mode).
        """
        return explain_pixel_regions(self.model, self.level, regions_BIXY, keep_Bhw, gradient_KBC, batch_size)


@torch.inference_mode(False)
def explain_pixel_regions(
    model: PixelRegions,
    level: LevelMethod,
    regions_BIXY: Shaped[Tensor, "B I X Y"],
    keep_Bhw: Bool[Tensor, "B h w"] | None,
    gradient_KBC: Float[Tensor, "K B C"],
    batch_size: int = 64,
) -> RegionMaps:
    """Pass 2, whatever reads the regions' embeddings. Arguments and errors as in :meth:`ThreeLevelCDAM.regions`.

    Args:
        model: the two lower levels.
        level: the method.
    """
    check_explainable(model)
    encoder = model.region_encoder
    patches = model.cut(regions_BIXY, keep_Bhw)
    parts = [
        _patch_tokens(model, pixels, keep)
        for pixels, keep in zip(patches.pixels_TIpp.split(batch_size), patches.keep_Thw.split(batch_size), strict=True)
    ]
    with torch.no_grad():
        embeddings = torch.cat([model.patch_encoder.predict(tokens) for tokens in parts])
    of_regions = products_with(gradient_KBC)

    def scores_of(at: Tensor) -> Tensor:
        return of_regions(encoder.predict(encoder.before_last_block(model.region_tokens(at, patches)))).sum(dim=0)

    gradient_KTC = level.path(scores_of, embeddings).gradient_KTC
    assert gradient_KTC is not None, "it is kept"
    with torch.no_grad():
        tokens = encoder.before_last_block(model.region_tokens(embeddings, patches))
    patch_maps = as_maps(level.explain(encoder, tokens, of_regions)[0], tokens).transpose(0, 1)
    token_maps, of_patches = [], []
    for part, gradient in zip(parts, gradient_KTC.split(batch_size, dim=1), strict=True):
        relevance, account = level.explain(model.patch_encoder, part, target := products_with(gradient))
        token_maps.append(as_maps(relevance, part))  # [t, K, s, s]
        if account is not None:
            of_patches.append(unmapped(model.patch_encoder, part, target, account))
    tokens_BhwK = join_patches(torch.cat(token_maps).movedim(1, 3), patches.packing, patches.grid_HW)
    unmapped_KB = None
    if level.method.complete:
        unmapped_KB = _of_empty_region(model, patches, of_regions)
        unmapped_KB.index_add_(1, patches.packing.sequence_of_token, torch.cat(of_patches, dim=1))
    return RegionMaps(patch_maps, tokens_BhwK.movedim(3, 0), unmapped_KB)


@torch.no_grad()
def _of_empty_region(
    model: PixelRegions, patches: RegionPatches, of_regions: Callable[[Tensor], Tensor]
) -> Float[Tensor, "K B"]:
    """The regions' scores where their patches' embeddings are 0."""
    zeros = model.pixel_mean.new_zeros(len(patches.pixels_TIpp), model.patch_encoder.embed_dim)
    encoder = model.region_encoder
    tokens = encoder.before_last_block(model.region_tokens(zeros, patches))
    return of_regions(encoder.predict(tokens)).T.contiguous()


@torch.no_grad()
def _patch_tokens(model: PixelRegions, pixels_TIpp: Tensor, keep_Tss: Tensor) -> PackedTokens:
    return model.patch_encoder.before_last_block(model.patch_tokens(pixels_TIpp, keep_Tss))
