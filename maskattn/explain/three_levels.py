"""Hierarchical CDAM on three levels: relevance of a slide's regions, of their patches, and of the patches' tokens.

Pass 1 is that of two levels: it computes the regions' relevance and the gradient γ_rc of slide logit f_c at region
embedding z_r. Pass 2 explains the score z_r·γ_rc in a region, with γ held fixed: first the region's patches at the
region encoder, whose gradient δ_pc at the patch embeddings e_p then defines the score e_p·δ_pc of the tokens. With
CDAM this is the exact chain rule, applied twice. A complete method follows its path at every level, with γ and δ the
mean gradients along the paths of the embeddings, and reports the remainder that no token holds. The only graphs are
those of the region encoder over some regions and of the tail of some patches' last block.

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
    """The result of pass 2: relevance in B regions; 0 at background.

    Attributes:
        patches_KBnm: (K, B, n, m), signed scores of the patches for the slide's classes.
        tokens_KBhw: (K, B, h, w), signed scores of their tokens.
        unmapped_KB: (K, B), the remainder of z_r·γ_rc that no token holds: the share of the class tokens and registers
            of region and patches, and the scores at the start of the paths; None if the method is not complete.
    """

    patches_KBnm: Float[Tensor, "K B n m"]
    tokens_KBhw: Float[Tensor, "K B h w"]
    unmapped_KB: Float[Tensor, "K B"] | None = None


class ThreeLevelCDAM:
    """Explanations of a HIPT for all its classes.

    Args:
        model: a HIPT in eval mode.
        method: a key of :data:`maskattn.explain.METHODS` that explains slide models; "cdam" is the paper's method.
        options: options of the method (``m``).

    Raises:
        ValueError: there is no such method for slide models.
    """

    def __init__(self, model: HIPT, method: str = DEFAULT_METHOD, **options: Any) -> None:
        self.model = model
        self.level = LevelMethod.named(method, model.patch_encoder, **options)

    def slide(
        self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"], *, gradient: bool = True
    ) -> RelevanceMap:
        """Pass 1: compute the slide's logits and the relevance of each region.

        Args:
            embeddings_TC: (T, C) from ``model.encode_regions``, in row-major order.
            keep_HW: (H, W) bool over the slide's regions.
            gradient: also compute the gradient that pass 2 needs.

        Raises:
            ValueError: dropout is active (train mode), or embeddings and kept regions do not match.
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
        """Pass 2: compute the relevance of each patch and token of some regions.

        Args:
            regions_BIXY, keep_Bhw: as in ``model.encode_regions``.
            gradient_KBC: (K, B, C), the rows of :attr:`RelevanceMap.gradient_KTC` for these regions; ignored for
                regions without tissue.
            batch_size: patches that go through the patch encoder at a time.

        Raises:
            ValueError: dropout is active (train mode).
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
    """Run pass 2, independent of the slide level. Other arguments and errors as in :meth:`ThreeLevelCDAM.regions`.

    Args:
        model: the two lower levels.
        level: the method.
    """
    check_explainable(model)
    encoder = model.region_encoder
    patches = model.cut(regions_BIXY, keep_Bhw)
    chunks = [
        _patch_tokens(model, pixels, keep)
        for pixels, keep in zip(patches.pixels_TIpp.split(batch_size), patches.keep_Thw.split(batch_size), strict=True)
    ]
    with torch.no_grad():
        embeddings = torch.cat([model.patch_encoder.predict(tokens) for tokens in chunks])
    of_regions = products_with(gradient_KBC)

    def scores_of(at: Tensor) -> Tensor:
        return of_regions(encoder.predict(encoder.before_last_block(model.region_tokens(at, patches)))).sum(dim=0)

    gradient_KTC = level.path(scores_of, embeddings).gradient_KTC
    assert gradient_KTC is not None, "path() keeps it by default"
    with torch.no_grad():
        tokens = encoder.before_last_block(model.region_tokens(embeddings, patches))
    patch_maps = as_maps(level.explain(encoder, tokens, of_regions)[0], tokens).transpose(0, 1)
    token_maps, of_patches = [], []
    for chunk, gradient in zip(chunks, gradient_KTC.split(batch_size, dim=1), strict=True):
        relevance, account = level.explain(model.patch_encoder, chunk, target := products_with(gradient))
        token_maps.append(as_maps(relevance, chunk))  # [t, K, s, s]
        if account is not None:
            of_patches.append(unmapped(model.patch_encoder, chunk, target, account))
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
    """Compute the regions' scores (K, B) with all patch embeddings set to 0."""
    zeros = model.pixel_mean.new_zeros(len(patches.pixels_TIpp), model.patch_encoder.embed_dim)
    encoder = model.region_encoder
    tokens = encoder.before_last_block(model.region_tokens(zeros, patches))
    return of_regions(encoder.predict(tokens)).T.contiguous()


@torch.no_grad()
def _patch_tokens(model: PixelRegions, pixels_TIpp: Tensor, keep_Tss: Tensor) -> PackedTokens:
    return model.patch_encoder.before_last_block(model.patch_tokens(pixels_TIpp, keep_Tss))
