"""Hierarchical CDAM on three levels: relevance of a slide's regions, of their patches, and of the patches' tokens.

With slide logit f_c and region embeddings z_r, pass 1 is that of two levels: the regions' relevance and
γ_rc = ∂f_c/∂z_r. Pass 2 explains the score z_r·γ_rc in a region, γ held fixed: first its patches at the region encoder,
whose gradient δ_pc at the patch embeddings e_p then gives the tokens' score e_p·δ_pc. It is the exact chain rule twice
over; the graphs that are held are the region encoder's over some regions and the tail of some patches' last block.

Dimension key: K classes, T kept regions or patches, B regions of a batch, n·m patches and h·w tokens of a region,
s·s tokens of a patch, C channels, H·W regions of the slide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskattn.explain.explainer import as_maps
from maskattn.explain.factorised import join_patches
from maskattn.explain.hierarchical import RelevanceMap, explain_slide, gradients_of, products_with
from maskattn.explain.packed_model import check_explainable
from maskattn.explain.token_scores import score_tokens
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.hipt import HIPT
from maskattn.shapes import Bool, Float

__all__ = ["RegionMaps", "ThreeLevelCDAM"]


@dataclass(frozen=True)
class RegionMaps:
    """What pass 2 says of B regions; 0 at background.

    Attributes:
        patches_KBnm: (K, B, n, m), signed scores of the patches for the slide's classes.
        tokens_KBhw: (K, B, h, w), signed scores of their tokens.
    """

    patches_KBnm: Float[Tensor, "K B n m"]
    tokens_KBhw: Float[Tensor, "K B h w"]


class ThreeLevelCDAM:
    """Explanations of a HIPT, for all its classes at once.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: HIPT) -> None:
        self.model = model

    def slide(
        self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"], *, gradient: bool = True
    ) -> RelevanceMap:
        """Pass 1: the slide's logits and the relevance of each region.

        Args:
            embeddings_TC: (T, C) from ``model.encode_regions``, row-major.
            keep_HW: (H, W) bool over the slide's regions.
            gradient: also take the gradient that pass 2 needs.
        """
        return explain_slide(self.model, embeddings_TC, keep_HW, gradient)

    @torch.inference_mode(False)
    def regions(
        self,
        regions_BIXY: Float[Tensor, "B I X Y"],
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
        check_explainable(self.model)
        model, encoder = self.model, self.model.region_encoder
        patches = model.cut(regions_BIXY, keep_Bhw)
        parts = [
            self._patch_tokens(pixels, keep)
            for pixels, keep in zip(
                patches.pixels_TIpp.split(batch_size), patches.keep_Thw.split(batch_size), strict=True
            )
        ]
        with torch.no_grad():
            embeddings = torch.cat([model.patch_encoder.predict(tokens) for tokens in parts])
        embeddings_TC = embeddings.clone().requires_grad_()
        of_regions = products_with(gradient_KBC)
        with torch.enable_grad():
            tokens = encoder.before_last_block(model.region_tokens(embeddings_TC, patches))
            scores_BK = of_regions(encoder.predict(tokens))
            gradient_KTC = gradients_of(scores_BK.sum(dim=0), embeddings_TC)
        tokens = tokens.with_rows(tokens.rows_TC.detach())
        patch_maps = as_maps(score_tokens(encoder, tokens, of_regions)[0], tokens).transpose(0, 1)
        token_maps = []
        for part, gradient in zip(parts, gradient_KTC.split(batch_size, dim=1), strict=True):
            relevance, _ = score_tokens(model.patch_encoder, part, products_with(gradient))
            token_maps.append(as_maps(relevance, part))  # [t, K, s, s]
        tokens_BhwK = join_patches(torch.cat(token_maps).movedim(1, 3), patches.packing, patches.grid_HW)
        return RegionMaps(patch_maps, tokens_BhwK.movedim(3, 0))

    @torch.no_grad()
    def _patch_tokens(self, pixels_TIpp: Tensor, keep_Tss: Tensor) -> PackedTokens:
        encoder = self.model.patch_encoder
        return encoder.before_last_block(encoder.embed(pixels_TIpp, keep_Tss))
