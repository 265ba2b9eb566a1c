"""The factorised attention map of a three-level model: attention of patch, region and slide level in one token map.

Each level's class-token row (last block, mean over heads) is normalised over the tokens that take part, within its
patch, its region or the slide. The three are combined with γ, the weight of the levels trained for the task:

    (w_R · R + w_P · P + γ · S) / (n (1 − γ) + (3 − n) γ),

where w is 1 − γ for a frozen encoder and γ for a trained one, and n is the number of frozen encoders of the two.
Background is exactly 0. Source: Grisi et al., arXiv 2404.18152, after HIPT (arXiv 2206.02647).

Dimension key: B regions, T kept patches or regions, h·w tokens of a region, H·W regions of a slide.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from maskattn.explain.attention_maps import attend_from_class_token
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.hipt import HIPT, PixelRegions
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import Packing, unpack
from maskattn.shapes import Bool, Float, Shaped

__all__ = ["FactorisedAttention", "FactorisedMaps", "join_patches", "normalise"]

_LEVELS = ("patch", "region")


@dataclass(frozen=True)
class FactorisedMaps:
    """Attention to each token of B regions; 0 at background.

    Attributes:
        combined_Bhw: (B, h, w), the three levels combined, in [0, 1].
        patch_Bhw: (B, h, w), the patch encoder's attention, normalised within each patch.
        region_Bhw: (B, h, w), the region encoder's attention, normalised within each region; every token of a patch
            has the patch's value.
    """

    combined_Bhw: Float[Tensor, "B h w"]
    patch_Bhw: Float[Tensor, "B h w"]
    region_Bhw: Float[Tensor, "B h w"]


class FactorisedAttention:
    """Attention maps of all three levels of a HIPT.

    Args:
        model: a HIPT in eval mode, or its two lower levels if :meth:`slide` is not called. Every level has a class
            token, or is HIPT's own slide level, whose pooling weights are used instead.
        gamma: γ in [0, 1], the weight of the levels that were trained for the task.
        trained: which of "patch" and "region" were trained for the task; the slide level always is.
        scale: "rank" (a token's rank divided by the number of tokens, ties taking their lowest rank) or "minmax".

    Raises:
        ValueError: γ is out of range, or there is no such level or scale.
    """

    def __init__(
        self, model: PixelRegions, gamma: float = 0.5, trained: Collection[str] = (), scale: str = "rank"
    ) -> None:
        if not 0 <= gamma <= 1 or set(trained) - set(_LEVELS) or scale not in ("rank", "minmax"):
            raise ValueError(
                "gamma must be in [0, 1], trained must name 'patch' or 'region', scale must be 'rank' or 'minmax', got "
                f"gamma={gamma}, trained={trained!r}, scale={scale!r}"
            )
        self.model, self.gamma, self.scale = model, gamma, scale
        self.patch_weight, self.region_weight = (gamma if level in trained else 1 - gamma for level in _LEVELS)
        if self.patch_weight + self.region_weight + gamma == 0:
            raise ValueError(
                "gamma=0 counts only frozen levels, so one encoder must be frozen, got trained='patch' and 'region'; "
                "use a larger gamma"
            )

    @torch.no_grad()
    def slide(self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"]) -> Float[Tensor, "T"]:
        """Return the slide level's attention to each kept region, normalised over the kept regions.

        Args:
            embeddings_TC: (T, C) from ``model.encode_regions``, in row-major order.
            keep_HW: (H, W) bool over the slide's regions.
        """
        model = self.model
        assert isinstance(model, HIPT), "two levels have no slide"
        encoder = model.slide_encoder
        if isinstance(encoder, HIPTHead):
            packing = model.packed_regions(embeddings_TC, keep_HW)
            return normalise(encoder.attention(embeddings_TC)[0], packing, self.scale)
        tokens = encoder.before_last_block(model.slide_tokens(embeddings_TC, keep_HW))
        rows_1T, packing = _grid_attention(encoder, tokens)
        return normalise(rows_1T, packing, self.scale)

    @torch.no_grad()
    def regions(
        self,
        regions_BIXY: Shaped[Tensor, "B I X Y"],
        keep_Bhw: Bool[Tensor, "B h w"] | None,
        slide_B: Float[Tensor, "B"],
    ) -> FactorisedMaps:
        """Compute the maps of some regions.

        Args:
            regions_BIXY, keep_Bhw: as in ``model.encode_regions``.
            slide_B: (B,), the values of :meth:`slide` for these regions; ignored for regions without tissue.
        """
        model = self.model
        patches = model.cut(regions_BIXY, keep_Bhw)
        embeddings_TC, patch_Tss = self._patches(patches.pixels_TIpp, patches.keep_Thw)
        encoder = model.region_encoder
        tokens = encoder.before_last_block(model.region_tokens(embeddings_TC, patches))
        region_T = normalise(*_grid_attention(encoder, tokens), self.scale)
        keep_Tss = patches.keep_Thw.to(patch_Tss.dtype)
        slide_T = slide_B.to(patch_Tss)[patches.packing.sequence_of_token]
        total = self.patch_weight + self.region_weight + self.gamma
        combined_Tss = self.patch_weight * patch_Tss
        combined_Tss = combined_Tss + (self.region_weight * region_T + self.gamma * slide_T)[:, None, None]
        maps = (combined_Tss * keep_Tss / total, patch_Tss, region_T[:, None, None] * keep_Tss)
        return FactorisedMaps(*(join_patches(x, patches.packing, patches.grid_HW) for x in maps))

    def _patches(self, pixels_TIpp: Tensor, keep_Tss: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """Return the embeddings of patches and their normalised attention (T, s, s)."""
        encoder = self.model.patch_encoder
        side = self.model.patch_px // self.model.token_px
        embeddings = [self.model.pixel_mean.new_empty(0, encoder.embed_dim)]
        maps = [self.model.pixel_mean.new_empty(0, side, side)]
        for pixels, keep in zip(pixels_TIpp.split(batch_size), keep_Tss.split(batch_size), strict=True):
            if not len(pixels):
                continue
            tokens = encoder.before_last_block(self.model.patch_tokens(pixels, keep))
            embeddings.append(encoder.predict(tokens))
            rows, packing = _grid_attention(encoder, tokens)
            maps.append(unpack(normalise(rows, packing, self.scale), packing).unflatten(1, (side, side)))
        return torch.cat(embeddings), torch.cat(maps)


def normalise(values_T: Float[Tensor, "T"], packing: Packing, scale: str) -> Float[Tensor, "T"]:
    """Scale the values of each sequence to [0, 1], by ranks or by their range.

    Args:
        values_T: (T,), one for each packed token.
        packing: the packing of the tokens.
        scale: "rank": the rank divided by the sequence's length, ties taking their lowest rank; "minmax": 0 for the
            smallest value, 1 for the largest, and 1 if all are equal.
    """
    result = torch.empty_like(values_T)
    for start, end in zip(packing.cu_seqlens[:-1].tolist(), packing.cu_seqlens[1:].tolist(), strict=True):
        x = values_T[start:end]
        if not len(x):
            continue
        if scale == "rank":
            result[start:end] = (torch.searchsorted(x.sort().values, x) + 1).to(x.dtype) / len(x)
        else:
            low, high = x.min(), x.max()
            result[start:end] = torch.where(high > low, (x - low) / (high - low), torch.ones_like(x))
    return result


def _grid_attention(encoder: VisionTransformer, tokens: PackedTokens) -> tuple[Tensor, Packing]:
    """Return the class-token row over grid tokens, mean over heads (T,), and the packing of the grid tokens."""
    rows_T1 = attend_from_class_token(encoder, tokens).mean(dim=0)[:, None]
    grid_T1, packing = tokens.with_rows(rows_T1).grid_rows()
    return grid_T1[:, 0], packing


def join_patches(
    values_Tss: Float[Tensor, "T s s *values"], packing: Packing, grid_HW: tuple[int, int]
) -> Float[Tensor, "B h w *values"]:
    """Assemble maps of patches into maps of their regions; 0 where no patch was kept.

    Args:
        values_Tss: (T, s, s), maps of the kept patches; further axes stay last.
        packing: the positions of the patches in (B, n·m).
        grid_HW: (n, m), rows and columns of patches in a region.
    """
    dense = unpack(values_Tss, packing).unflatten(1, grid_HW)  # [B, n, m, s, s]
    return dense.transpose(2, 3).flatten(3, 4).flatten(1, 2)
