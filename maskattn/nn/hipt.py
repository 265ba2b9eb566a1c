"""HIPT with background masked at all three levels: the patches of a region, the regions of a slide, the slide.

The patch ViT reads the tissue tokens (16 px) of patches (256 px), the region ViT reads those patches of regions
(4096 px) that hold tissue, and the slide level reads the regions that hold tissue. The embedding of a patch without
tissue would be a constant, so the patch is left out of its region. A region without tissue is left out of its slide for
the same reason.

Sources: Chen et al., CVPR 2022 (arXiv 2206.02647), for the hierarchy and its weights; Grisi et al., arXiv 2404.18152,
for masking. HIPT trains its slide level for each task. :func:`maskattn.nn.load_hipt` reads such checkpoints;
``slide_level`` builds an untrained slide level of this package, two blocks over the regions' embeddings.

Dimension key: B regions, X·Y pixels of a region, n·m patches of a region, h·w tokens of a region, T kept patches or
regions, C channels, H·W regions of a slide, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maskattn.nn.checkpoints import load_vit
from maskattn.nn.encoders.pixels import tokens_of_tiles
from maskattn.nn.inference_linear import rounded_up
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.region_model import RegionModel, check_widths, pooled_regions
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing, pack
from maskattn.shapes import Bool, Float, Shaped

__all__ = ["HEADS", "HIPT", "PatchLevel", "PixelRegions", "RegionPatches", "slide_level"]

_HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of HIPT's pixels
HEADS = 6  # of HIPT's patch and region ViTs, whose weights do not record it


@dataclass(frozen=True)
class RegionPatches:
    """The kept patches of some regions.

    Attributes:
        pixels_TIpp: (T, 3, p, p), region by region, row-major, in the regions' dtype.
        keep_Thw: (T, p/16, p/16) bool, the tokens of each patch that take part.
        packing: the positions of the patches in (B, n·m).
        grid_HW: (n, m).
    """

    pixels_TIpp: Shaped[Tensor, "T 3 p p"]
    keep_Thw: Bool[Tensor, "T h w"]
    packing: Packing
    grid_HW: tuple[int, int]


class PatchLevel(nn.Module):
    """HIPT's patch ViT, with the cutting of regions into patches.

    Args:
        patch_encoder: a ViT over pixels, without a head.
        patch_px: the side of a patch, in px.
        pixel_mean, pixel_std: the statistics per channel, of pixels scaled to [0, 1], that uint8 pixels are normalised
            with.

    Raises:
        ValueError: patch_px is not a multiple of the token's side.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        patch_encoder: VisionTransformer,
        patch_px: int = 256,
        pixel_mean: Sequence[float] = _HALF,
        pixel_std: Sequence[float] = _HALF,
    ) -> None:
        super().__init__()
        self._set_patch_level(patch_encoder, patch_px, pixel_mean, pixel_std)

    def _set_patch_level(
        self,
        patch_encoder: VisionTransformer,
        patch_px: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        if patch_px % patch_encoder.patch_embed.patch_size:
            raise ValueError(
                f"patch_px must be a multiple of the patch encoder's patch_size, got patch_px={patch_px} and "
                f"{patch_encoder.patch_embed.patch_size}"
            )
        self.patch_encoder = patch_encoder
        self.patch_px = patch_px
        weight = patch_encoder.patch_embed.proj.weight
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            statistic = torch.tensor(tuple(values), dtype=weight.dtype, device=weight.device)
            self.register_buffer(name, statistic, persistent=False)

    @property
    def token_px(self) -> int:
        """The side of a token, in px."""
        return self.patch_encoder.patch_embed.patch_size

    def cut(self, regions_BIXY: Shaped[Tensor, "B I X Y"], keep_Bhw: Bool[Tensor, "B h w"] | None) -> RegionPatches:
        """Cut out the patches of some regions that hold a kept token; other pixels are not read.

        Args:
            regions_BIXY: (B, 3, X, Y), X and Y multiples of ``patch_px``; uint8 RGB, or floats normalised for the patch
                encoder.
            keep_Bhw: (B, X/16, Y/16) bool over the regions' tokens; None keeps all.

        Raises:
            TypeError, ValueError: shapes or dtype do not fit.
        """
        B, p, side = len(regions_BIXY), self.patch_px, self.patch_px // self.token_px
        if regions_BIXY.ndim != 4 or regions_BIXY.shape[2] % p or regions_BIXY.shape[3] % p:
            raise ValueError(
                f"regions must be (B, 3, X, Y) with X and Y multiples of patch_px={p}, got {tuple(regions_BIXY.shape)}"
            )
        grid_HW = regions_BIXY.shape[2] // p, regions_BIXY.shape[3] // p
        shape = (B, grid_HW[0] * side, grid_HW[1] * side)
        keep = torch.ones(shape, dtype=torch.bool, device=regions_BIXY.device) if keep_Bhw is None else keep_Bhw
        if keep.dtype != torch.bool or tuple(keep.shape) != shape:
            raise ValueError(
                f"keep must be bool over the regions' tokens, {shape}, got {keep.dtype} {tuple(keep.shape)}"
            )
        tokens = keep.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3).flatten(1, 2)  # [B, n·m, s, s]
        packing = Packing.from_keep(tokens.flatten(2).any(dim=2))
        cut = regions_BIXY.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B, 3, n, p, m, p]
        position, sequence = packing.indices % packing.num_tokens, packing.sequence_of_token
        row, column = torch.div(position, grid_HW[1], rounding_mode="floor"), position % grid_HW[1]
        return RegionPatches(cut[sequence, :, row, :, column], pack(tokens, packing), packing, grid_HW)

    def patch_tokens(
        self, pixels_TIpp: Shaped[Tensor, "T 3 p p"], keep_Tss: Bool[Tensor, "T s s"] | None
    ) -> PackedTokens:
        """Embed the tokens of patches as packed tokens for the patch encoder's blocks; only kept pixels are converted.

        Args:
            pixels_TIpp: (T, 3, p, p), patches as :meth:`cut` returns them.
            keep_Tss: (T, s, s) bool, the tokens that take part; None keeps all.
        """
        if pixels_TIpp.dtype != torch.uint8:
            return self.patch_encoder.embed(pixels_TIpp, keep_Tss)
        return tokens_of_tiles(self.patch_encoder, pixels_TIpp, keep_Tss, self.pixel_mean, self.pixel_std)

    def encode_patches(self, patches: RegionPatches, batch_size: int = 64) -> Float[Tensor, "T C"]:
        """Embed patches, ``batch_size`` at a time."""
        embeddings = [self.pixel_mean.new_empty(0, self.patch_encoder.embed_dim)]
        for pixels, keep in zip(patches.pixels_TIpp.split(batch_size), patches.keep_Thw.split(batch_size), strict=True):
            if len(pixels):
                embeddings.append(self.patch_encoder(rounded_up(self.patch_tokens(pixels, keep)))[: len(pixels)])
        return torch.cat(embeddings)


class PixelRegions(PatchLevel):
    """HIPT's two lower levels, patch ViT → region ViT, which embed regions from their pixels.

    Args:
        patch_encoder: a ViT over pixels, without a head.
        region_encoder: a ViT over the patch encoder's embeddings (patch_size 1), without a head.
        patch_px, pixel_mean, pixel_std: as for :class:`PatchLevel`.

    Raises:
        ValueError: the two widths differ, or patch_px is not a multiple of the token's side.
    """

    region_encoder: VisionTransformer

    def __init__(
        self,
        patch_encoder: VisionTransformer,
        region_encoder: VisionTransformer,
        patch_px: int = 256,
        pixel_mean: Sequence[float] = _HALF,
        pixel_std: Sequence[float] = _HALF,
    ) -> None:
        check_widths(patch_encoder, region_encoder, "patch and region")
        super().__init__(patch_encoder, patch_px, pixel_mean, pixel_std)
        self.region_encoder = region_encoder

    def region_tokens(self, embeddings_TC: Float[Tensor, "T C"], patches: RegionPatches) -> PackedTokens:
        """Embed patch embeddings (T, C) as packed tokens for the region encoder's blocks."""
        return self.region_encoder.embed_patches(embeddings_TC, patches.packing, patches.grid_HW)

    def encode_regions(
        self, regions_BIXY: Shaped[Tensor, "B I X Y"], keep_Bhw: Bool[Tensor, "B h w"] | None = None
    ) -> tuple[Float[Tensor, "T C"], Bool[Tensor, "B"]]:
        """Embed the regions that hold tissue. Arguments as in :meth:`cut`.

        Returns:
            The embeddings (T, C), and (B,) bool, True for the regions that have one.
        """
        patches = self.cut(regions_BIXY, keep_Bhw)
        features_TC = self.encode_patches(patches)
        return pooled_regions(self.region_encoder, features_TC, patches.packing, patches.grid_HW)


class HIPT(PixelRegions, RegionModel):
    """The three levels of HIPT: patch ViT → region ViT → slide level.

    Args:
        patch_encoder: a ViT over pixels, without a head.
        region_encoder: a ViT over the patch encoder's embeddings (patch_size 1), without a head.
        slide_encoder: the slide level over the region encoder's embeddings: a ViT (patch_size 1) whose head gives the
            slide's logits, or HIPT's own slide level.
        patch_px, pixel_mean, pixel_std: as for :class:`PatchLevel`.

    Raises:
        ValueError: one encoder's width is not the next one's, or patch_px is not a multiple of the token's side.
    """

    def __init__(
        self,
        patch_encoder: VisionTransformer,
        region_encoder: VisionTransformer,
        slide_encoder: VisionTransformer | HIPTHead,
        patch_px: int = 256,
        pixel_mean: Sequence[float] = _HALF,
        pixel_std: Sequence[float] = _HALF,
    ) -> None:
        check_widths(patch_encoder, region_encoder, "patch and region")
        nn.Module.__init__(self)  # the two setters below register each level, lowest first
        self._set_patch_level(patch_encoder, patch_px, pixel_mean, pixel_std)
        self._set_upper_levels(region_encoder, slide_encoder)

    @classmethod
    def load(
        cls, patch_weights: str | Path, region_weights: str | Path, num_classes: int, impl: str | None = None
    ) -> HIPT:
        """Load HIPT's two pretrained ViTs (ViT-256, ViT-4096) and put an untrained slide level on top.

        Args:
            patch_weights: ``vit256_small_dino.pth``, or a file of that layout.
            region_weights: ``vit4k_xs_dino.pth``, or a file of that layout.
            num_classes: K.
            impl: the implementation of attention; None takes the best.

        Raises:
            FileNotFoundError, UnsupportedModelError: as :func:`maskattn.nn.load_vit` raises them.
        """
        patch = load_vit(patch_weights, num_heads=HEADS, impl=impl, pos_embed_resample="dino")
        region = load_vit(region_weights, num_heads=HEADS, impl=impl, pos_embed_resample="dino")
        return cls(patch, region, slide_level(region.embed_dim, num_classes, impl=impl))

    @classmethod
    def random(cls, num_classes: int, impl: str | None = None) -> HIPT:
        """Build HIPT with random weights in its published sizes: a ViT-S/16, then 6 and 2 blocks of 192 channels."""
        patch = VisionTransformer(embed_dim=384, num_heads=HEADS, pos_embed_resample="dino", impl=impl)
        region = VisionTransformer(
            img_size=14,
            patch_size=1,
            in_chans=384,
            embed_dim=192,
            depth=6,
            num_heads=HEADS,
            embed_act="gelu",
            pos_embed_resample="dino",
            impl=impl,
        )
        return cls(patch, region, slide_level(192, num_classes, impl=impl))


def slide_level(dim: int, num_classes: int, impl: str | None = None) -> VisionTransformer:
    """Build HIPT's slide level as a masked ViT: a projection with ReLU, two blocks of three heads, no positions."""
    return VisionTransformer(
        img_size=1,
        patch_size=1,
        in_chans=dim,
        num_classes=num_classes,
        embed_dim=dim,
        depth=2,
        num_heads=3,
        pos_embed="none",
        embed_act="relu",
        impl=impl,
    )
