"""The two upper levels of HIPT: the region ViT over patch embeddings, and the slide level over region embeddings.

No more is needed if the patches were encoded earlier, as in slide2vec's ``hierarchical_embeddings``.

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
    """HIPT without its patch level: region ViT → slide level.

    Args:
        region_encoder: a ViT over patch embeddings (patch_size 1), without a head.
        slide_encoder: the slide level over the region encoder's embeddings: a ViT (patch_size 1) whose head gives the
            slide's logits, or HIPT's own slide level.

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
        """Embed the regions that have a kept patch, from their patches' embeddings.

        Args:
            features_BNC: (B, n·n, C), each region's patches row-major.
            keep_BN: (B, n·n) bool, the patches that take part; None keeps all.

        Returns:
            The embeddings (T, C), and (B,) bool, True for the regions that have one.

        Raises:
            ValueError: the patches of a region do not form a square, or have another width.
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
        """Embed the kept regions, row-major, as packed tokens for the blocks of the slide's ViT.

        Raises:
            ValueError: the numbers of embeddings and of kept regions differ, or the slide level is not a ViT.
        """
        if not isinstance(self.slide_encoder, VisionTransformer):
            raise ValueError(
                f"only a ViT has slide tokens, got a {type(self.slide_encoder).__name__} as the slide level; "
                "call the model itself"
            )
        packing = self.packed_regions(embeddings_TC, keep_HW)
        return self.slide_encoder.embed_patches(embeddings_TC, packing, (keep_HW.shape[0], keep_HW.shape[1]))

    def forward(self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]) -> Float[Tensor, "K"]:
        """Compute the slide's logits (K,) from the embeddings of its kept regions.

        Args:
            embeddings_TC: (T, C), a row for each kept region, row-major.
            keep_HW: (H, W) bool over the slide's regions. HIPT's own slide level ignores the regions' positions.

        Raises:
            ValueError: the numbers of embeddings and of kept regions differ, or there are none.
        """
        if isinstance(self.slide_encoder, HIPTHead):
            self.packed_regions(embeddings_TC, keep_HW)
            logits: Tensor = self.slide_encoder(embeddings_TC)
            return logits
        return self.slide_encoder(self.slide_tokens(embeddings_TC, keep_HW))[0]

    def packed_regions(self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]) -> Packing:
        """Return the packing of the kept regions in (1, H·W). Arguments and errors as in :meth:`forward`."""
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
    """Embed the regions that have patches, from the patches' embeddings; (B,) bool marks these regions."""
    keep_B = packing.cu_seqlens.diff() > 0
    if not packing.total:
        return embeddings_TC.new_empty(0, region_encoder.embed_dim), keep_B
    return region_encoder(region_encoder.embed_patches(embeddings_TC, packing, grid_HW))[keep_B], keep_B


def check_widths(below: VisionTransformer, above: VisionTransformer | HIPTHead, names: str) -> None:
    """Check that one level outputs embeddings of the width that the next one reads.

    Raises:
        ValueError: it does not.
    """
    in_chans = above.in_dim if isinstance(above, HIPTHead) else above.patch_embed.in_chans
    if below.num_classes or below.embed_dim != in_chans:
        raise ValueError(
            f"the {names} encoder must agree: the lower one without a head, and as wide as the upper one's in_chans, "
            f"got num_classes={below.num_classes}, width {below.embed_dim} and in_chans={in_chans}"
        )
