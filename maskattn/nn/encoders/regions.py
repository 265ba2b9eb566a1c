"""A tile encoder whose tiles are regions: HIPT's patch ViT and region ViT together, one region at a time.

It is used like any other tile encoder: ``maskattn extract`` stores its features, and a slide head reads them.

Dimension key: B regions, (h, w) tokens of a region, C channels.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from maskattn.nn.encoders.tile_encoder import EncoderCard, TileEncoder
from maskattn.nn.hipt import PixelRegions
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["RegionEncoder", "name_in_regions"]


def name_in_regions(patches: str, region_px: int) -> str:
    """Return the name, in outputs, of the region encoder that is built on an encoder of patches."""
    return f"{patches} in regions of {region_px} px"


class RegionEncoder(TileEncoder):
    """A tile encoder that embeds regions by a patch ViT and a region ViT.

    Args:
        patches: the encoder of patches: a packed transformer that neither resizes nor crops the patches of a slide.
        region_encoder: a ViT over the patches' embeddings (patch_size 1), without a head.
        region_px: the side of a region, in px at the patches' spacing.

    Attributes:
        levels: both transformers.

    Raises:
        ValueError: the encoder of patches does not run packed, or the sides or widths do not fit.
    """

    tiles_at_once: ClassVar[int | None] = 1
    min_tissue: ClassVar[float | None] = 0.0

    def __init__(self, patches: TileEncoder, region_encoder: VisionTransformer, region_px: int = 4096) -> None:
        card = patches.card
        if patches.vit is None or card.crop_px is not None or card.patch_px != card.tile_px:
            raise ValueError(
                f"regions need an encoder of patches that runs packed and neither resizes nor crops them, got "
                f"{card.name}: {card.why_not or 'it resizes or crops'}; take HIPT's"
            )
        if region_px % card.tile_px or region_px < 2 * card.tile_px:
            raise ValueError(
                f"a region's side must be a multiple of the patch's, at least two, got {region_px} px of patches of "
                f"{card.tile_px} px; take {max(2, round(region_px / card.tile_px)) * card.tile_px}"
            )
        mean, std = card.pixel_mean, card.pixel_std
        super().__init__(
            patches.vit,
            EncoderCard(
                name_in_regions(card.name, region_px),
                "token",
                mean,
                std,
                region_px,
                region_px,
                card.spacing_um,
                licence=card.licence,
            ),
        )
        self.levels = PixelRegions(patches.vit, region_encoder, card.tile_px, mean, std)
        self.embed_dim = region_encoder.embed_dim

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the names and values of both transformers' weights."""
        digest = hashlib.sha256()
        for name, x in sorted(self.levels.state_dict().items()):
            digest.update(name.encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode_tiles(
        self, tiles_BIXY: UInt8[Tensor, "B 3 X Y"], keep_BHW: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Embed regions, one at a time; a region without a kept token gives zeros.

        Args:
            tiles_BIXY: (B, 3, region_px, region_px) uint8, RGB.
            keep_BHW: (B, h, w) bool over each region's tokens; None keeps all.

        Raises:
            TypeError, ValueError: shapes or dtype do not fit.
        """
        rows = []
        for index, region in enumerate(tiles_BIXY):
            keep = None if keep_BHW is None else keep_BHW[index : index + 1]
            embedding, with_tissue = self.levels.encode_regions(region[None], keep)
            rows.append(embedding if bool(with_tissue[0]) else self.pixel_mean.new_zeros(1, self.embed_dim))
        return torch.cat(rows) if rows else self.pixel_mean.new_zeros(0, self.embed_dim)

    forward = encode_tiles
