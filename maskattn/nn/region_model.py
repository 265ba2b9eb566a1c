"""The two upper levels of HIPT: the region ViT over embeddings of patches, and the slide level over those of regions.

This is all that is needed where patches were encoded before, as slide2vec's ``hierarchical_embeddings`` are.

Dimension key: B regions, N = n·n patches of a region, T kept regions, C channels, H·W regions of a slide, K classes.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from maskattn.nn.kept_tokens import packing_of
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing, pack
from maskattn.shapes import Bool, Float

__all__ = ["RegionModel", "check_widths", "pooled_regions"]


class RegionModel(nn.Module):
    """Region ViT → slide level.

    Args:
        region_encoder: over embeddings of patches (patch_size 1), without a head.
        slide_encoder: over the region encoder's embeddings: a ViT (patch_size 1) with the classes as its head, or
            HIPT's own slide level.

    Raises:
        ValueError: one level's width is not the next one's.
    """

    def __init__(self, region_encoder: VisionTransformer, slide_encoder: VisionTransformer | HIPTHead) -> None:
        super().__init__()
        self._set_upper_levels(region_encoder, slide_encoder)

    def _set_upper_levels(self, region_encoder: VisionTransformer, slide_encoder: VisionTransformer | HIPTHead) -> None:
        check_widths(region_encoder, slide_encoder, "region and slide")
        self.region_encoder = region_encoder
        self.slide_encoder = slide_encoder

    def embed_regions(
        self, features_BNC: Float[Tensor, "B N C"], keep_BN: Bool[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "T C"], Bool[Tensor, "B"]]:
        """Embeddings of the regions that have a kept patch, from embeddings of their patches.

        Args:
            features_BNC: (B, n·n, C), each region's patches row-major.
            keep_BN: (B, n·n) bool, the patches that take part; None keeps all.

        Returns:
            (T, C), and (B,) bool, which of the regions they are.

        Raises:
            ValueError: the patches of a region are no square, or have another width.
        """
        B, N, C = features_BNC.shape
        side, width = math.isqrt(N), self.region_encoder.patch_embed.in_chans
        if side * side != N or width != C:
            raise ValueError(
                f"regions must be (B, n·n, {width}) embeddings of their patches, got {tuple(features_BNC.shape)}; take "
                "features of the patch encoder that the region encoder was trained with"
            )
        packing = packing_of(
            None if keep_BN is None else keep_BN.unflatten(1, (side, side)), B, (side, side), features_BNC.device
        )
        return pooled_regions(self.region_encoder, pack(features_BNC, packing), packing, (side, side))

    def slide_tokens(self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]) -> PackedTokens:
        """Embeddings of the kept regions, row-major, to the packed tokens with which the slide's ViT starts.

        Raises:
            ValueError: there are not as many embeddings as kept regions, or the slide level is no ViT.
        """
        if not isinstance(self.slide_encoder, VisionTransformer):
            raise ValueError(
                f"tokens of a slide are those of a ViT, got a {type(self.slide_encoder).__name__} as the slide level; "
                "call the model itself"
            )
        packing = self.packed_regions(embeddings_TC, keep_HW)
        return self.slide_encoder.embed_patches(embeddings_TC, packing, (keep_HW.shape[0], keep_HW.shape[1]))

    def forward(self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]) -> Float[Tensor, "K"]:
        """The slide's logits (K,) from its kept regions' embeddings.

        Args:
            embeddings_TC: (T, C), a row for each kept region, row-major.
            keep_HW: (H, W) bool over the slide's regions. HIPT's own slide level does not read where they lie.

        Raises:
            ValueError: there are not as many embeddings as kept regions, or none.
        """
        if isinstance(self.slide_encoder, HIPTHead):
            self.packed_regions(embeddings_TC, keep_HW)
            logits: Tensor = self.slide_encoder(embeddings_TC)
            return logits
        return self.slide_encoder(self.slide_tokens(embeddings_TC, keep_HW))[0]

    def packed_regions(self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]) -> Packing:
        """Where the kept regions lie among the slide's. Arguments and errors as in :meth:`forward`."""
        packing = Packing.from_keep(keep_HW.to(embeddings_TC.device).flatten()[None])
        if packing.total != len(embeddings_TC):
            raise ValueError(
                f"there must be one embedding for each kept region, got {len(embeddings_TC)} embeddings and "
                f"{packing.total} kept regions"
            )
        return packing


def pooled_regions(
    region_encoder: VisionTransformer,
    embeddings_TC: Float[Tensor, "T C"],
    packing: Packing,
    grid_HW: tuple[int, int],
) -> tuple[Float[Tensor, "R C"], Bool[Tensor, "B"]]:
    """The embeddings of the regions that have patches, from those of their patches, and which regions these are."""
    keep_B = packing.cu_seqlens.diff() > 0
    if not packing.total:
        return embeddings_TC.new_empty(0, region_encoder.embed_dim), keep_B
    return region_encoder(region_encoder.embed_patches(embeddings_TC, packing, grid_HW))[keep_B], keep_B


def check_widths(below: VisionTransformer, above: VisionTransformer | HIPTHead, names: str) -> None:
    """Make sure that one level hands over what the next one reads.

    Raises:
        ValueError: it does not.
    """
    in_chans = above.in_dim if isinstance(above, HIPTHead) else above.patch_embed.in_chans
    if below.num_classes or below.embed_dim != in_chans:
        raise ValueError(
            f"the {names} encoder must hand over embeddings of one width without a head, got num_classes="
            f"{below.num_classes}, width {below.embed_dim} and in_chans={in_chans}"
        )
