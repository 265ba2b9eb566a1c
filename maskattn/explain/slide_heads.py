"""Explanations of any slide model: relevance of tiles, and of tokens by way of the tile encoder.

Pass 1. A head that is a vision transformer is explained at its last block, like every transformer here. For any other
head the relevance of tile t for class c is r_ct = z_t·γ_ct. With CDAM, γ is ∂f_c/∂z_t. With a complete method, it is
the mean of that gradient along α·z, 0 ≤ α ≤ 1 (Integrated Gradients with adaptive nodes, see
:mod:`maskattn.explain.embedding_path`), so that Σ_t r_ct = f_c(z) − f_c(0), up to a gap that is reported. Only
vector–Jacobian products are computed, one for each class and node, so no T × T array arises beyond those of the head
itself. A head whose logits are sums over tiles supplies each tile's contribution itself (zero-shot scores).

Pass 2 is that of :mod:`maskattn.explain.hierarchical`: tokens of a tile are explained by the score z_t·γ_ct, with γ
held fixed.

Dimension key: T tiles, B tiles of a batch, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.hierarchical import (
    LevelMethod,
    RelevanceMap,
    SumOfMap,
    TokenMaps,
    explain_tokens,
    mean_attention,
    path_sum,
)
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.explain.packed_model import check_explainable
from maskattn.explain.region_tokens import explain_region_tokens
from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.kept_tokens import packing_of
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import pack
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["SlideHeadCDAM"]

# Above this many tiles, transformer blocks are recomputed in the backward pass instead of storing their activations.
_RECOMPUTE_ABOVE = 4096


class SlideHeadCDAM:
    """Explanations of a slide head and its tile encoder, for all classes.

    Args:
        head: a slide head in eval mode.
        encoder: the tile encoder, for pass 2; None if only tiles are explained.
        method: a key of :data:`maskattn.explain.METHODS` that explains slide models; "cdam" is the paper's method.
        region_level: the encoder of the tiles, if they are regions whose patches have stored features.
        options: options of the method (``m``).

    Raises:
        ValueError: there is no such method for slide models.
    """

    def __init__(
        self,
        head: SlideHead,
        encoder: TileEncoder | None = None,
        method: str = DEFAULT_METHOD,
        *,
        region_level: VisionTransformer | None = None,
        **options: Any,
    ) -> None:
        self.head = head
        self.encoder = encoder
        self.region_level = region_level
        some = head.vit if isinstance(head, ViTHead) else region_level if encoder is None else encoder.vit
        self.level = LevelMethod.named(method, some, **options)

    @torch.inference_mode(False)
    def tiles(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        coords_um_T2: Float[Tensor, "T 2"] | None = None,
        grid: TileGrid | None = None,
        *,
        gradient: bool = True,
        rollout: bool = False,
    ) -> RelevanceMap:
        """Pass 1: compute the slide's logits and the relevance of each tile, in the order of the embeddings.

        Args:
            embeddings_TC, coords_um_T2, grid: as in the head's forward. If the tiles are divided among processes, the
                map is of this process's tiles; logits and sums are the same in all processes.
            gradient: also return γ, which pass 2 needs: (K, T, C) numbers.
            rollout: return attention rolled out through all layers of the head instead of the last layer's.

        Raises:
            ValueError: the head cannot read the input, dropout is active (train mode), or the head has no rollout.
        """
        found = self._tiles(embeddings_TC, coords_um_T2, grid, gradient)
        if not rollout:
            return found
        with torch.no_grad():
            rolled_T = self.head.rollout(embeddings_TC.detach(), coords_um_T2, grid)
        if rolled_T is None:
            raise ValueError(
                "rollout needs layers whose attention weights sum to 1, got a slide model "
                f"({self.head.kind}) without any; leave it out (--attention last)"
            )
        return replace(found, attention_T=rolled_T.to(embeddings_TC))

    def _tiles(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        coords_um_T2: Float[Tensor, "T 2"] | None,
        grid: TileGrid | None,
        gradient: bool,
    ) -> RelevanceMap:
        check_explainable(self.head)
        head, z = self.head, embeddings_TC.detach().clone()

        with torch.no_grad():
            logits_K = head(z, coords_um_T2, grid)
            of_tiles_KT = head.contributions(z)
        if of_tiles_KT is not None:
            return self._of_sums(logits_K, of_tiles_KT, z, gradient)
        group = None if grid is None else grid.group
        # All processes of a group must decide alike, whatever their numbers of tiles.
        with _recomputed(head, group is not None or len(z) > _RECOMPUTE_ABOVE):
            found = None
            if gradient or not isinstance(head, ViTHead):
                found = self.level.path(head.along_path(z, coords_um_T2, grid), z, keep=gradient, group=group)
            if isinstance(head, ViTHead):
                relevance_KT, attention_T, sums = self._at_last_block(head, z, grid)
                path = None if found is None else path_sum(found)
                gradient_KTC = None if found is None else found.gradient_KTC
                return RelevanceMap(logits_K, relevance_KT, attention_T, gradient_KTC, sums, path)
        assert found is not None, "a head that is no transformer is explained by its path"
        with torch.no_grad():
            attention_AT = head.attention(z, coords_um_T2, grid)
        attention_T = z.new_zeros(len(z)) if attention_AT is None else attention_AT.mean(dim=0).to(z)
        sums = None
        if self.level.method.complete:
            sums = SumOfMap(found.difference_K, torch.zeros_like(logits_K), found.gap_K)
        return RelevanceMap(logits_K, found.products_KT, attention_T, found.gradient_KTC, sums, path_sum(found))

    @torch.inference_mode(False)
    def tokens(
        self,
        tiles_BIXY: UInt8[Tensor, "B 3 X Y"],
        keep_BHW: Bool[Tensor, "B h w"] | None,
        gradient_KBC: Float[Tensor, "K B C"],
        ranks_B: Float[Tensor, "B"] | None = None,
    ) -> TokenMaps:
        """Pass 2: compute the relevance of each token of some tiles.

        Args:
            tiles_BIXY: (B, 3, tile_px, tile_px) uint8, RGB.
            keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.
            gradient_KBC: (K, B, C), the rows of :attr:`RelevanceMap.gradient_KTC` for these tiles.
            ranks_B: (B,), the ranks of the head's attention to them from :func:`attention_ranks`, used by the
                factorised attention map of regions.

        Raises:
            ValueError: there is no tile encoder, it is not a packed transformer (the error gives the reason), or
                dropout is active (train mode).
        """
        encoder = self.encoder
        if encoder is None or encoder.vit is None:
            why = "none" if encoder is None else f"{encoder.name}, which is not one: {encoder.why_not}"
            raise ValueError(f"token maps need a tile encoder that is a packed vision transformer, got {why}")
        if isinstance(encoder, RegionEncoder):
            return explain_region_tokens(encoder, self.level, tiles_BIXY, keep_BHW, gradient_KBC, ranks_B)
        check_explainable(encoder)
        with torch.no_grad():
            tokens = encoder.tile_tokens(tiles_BIXY, keep_BHW)
        maps = explain_tokens(encoder.vit, self.level, tokens, gradient_KBC)
        margin = (encoder.tile_px - (encoder.card.crop_px or encoder.tile_px)) // (2 * encoder.token_px)
        if not margin:
            return maps
        # The margin that the encoder crops away does not contribute to the score.
        padding = (margin,) * 4
        return TokenMaps(F.pad(maps.relevance_KBHW, padding), F.pad(maps.attention_BHW, padding), maps.unmapped_KB)

    def patches(
        self,
        features_BNC: Float[Tensor, "B N C"],
        keep_BN: Bool[Tensor, "B N"],
        gradient_KBC: Float[Tensor, "K B D"],
    ) -> TokenMaps:
        """Pass 2 of stored regions: compute the relevance of their patches, the tokens of the region level.

        Args:
            features_BNC: (B, n·n, C), each region's patches in row-major order.
            keep_BN: (B, n·n) bool, the patches that have features.
            gradient_KBC: (K, B, D), the rows of :attr:`RelevanceMap.gradient_KTC` for these regions.

        Raises:
            ValueError: there is no region level, or dropout is active (train mode).
        """
        level = self.region_level
        if level is None:
            raise ValueError("patch maps need the region level, got none; pass region_level")
        check_explainable(level)
        side = math.isqrt(features_BNC.shape[1])
        packing = packing_of(keep_BN.unflatten(1, (side, side)), len(keep_BN), (side, side), features_BNC.device)
        with torch.no_grad():
            tokens = level.embed_patches(pack(features_BNC, packing), packing, (side, side))
        return explain_tokens(level, self.level, tokens, gradient_KBC)

    @torch.no_grad()
    def _of_sums(self, logits_K: Tensor, of_tiles_KT: Tensor, z_TC: Tensor, gradient: bool) -> RelevanceMap:
        """Explain a head whose logits are sums over tiles; the result is exact and the same for every method."""
        attention_AT = self.head.attention(z_TC)
        attention_T = z_TC.new_zeros(len(z_TC)) if attention_AT is None else attention_AT.mean(dim=0).to(z_TC)
        sums = SumOfMap(logits_K, torch.zeros_like(logits_K), logits_K - of_tiles_KT.sum(dim=1))
        gradient_KTC = self.head.linear_form(z_TC) if gradient else None
        return RelevanceMap(logits_K, of_tiles_KT, attention_T, gradient_KTC, sums)

    def _at_last_block(
        self, head: ViTHead, z_TC: Tensor, grid: TileGrid | None
    ) -> tuple[Float[Tensor, "K T"], Float[Tensor, "T"], SumOfMap | None]:
        with torch.no_grad():
            first, order_T = head.tokens(z_TC, grid)
            tokens = head.vit.before_last_block(first)
        relevance_KT, account = self.level.explain(head.vit, tokens, "all")
        P = tokens.own_prefix
        both = torch.cat([relevance_KT[:, P:], mean_attention(head.vit, tokens)[None, P:]])
        both = torch.empty_like(both).index_copy_(1, order_T, both)
        sums = None if account is None else SumOfMap(account.difference_BM[0], account.prefix_BM[0], account.gap_BM[0])
        return both[:-1], both[-1], sums


@contextmanager
def _recomputed(head: nn.Module, wanted: bool) -> Iterator[None]:
    """Turn on activation checkpointing in the head's vision transformers, if wanted."""
    transformers = [module for module in head.modules() if isinstance(module, VisionTransformer)] if wanted else []
    before = [transformer.grad_checkpointing for transformer in transformers]
    for transformer in transformers:
        transformer.grad_checkpointing = True
    try:
        yield
    finally:
        for transformer, was in zip(transformers, before, strict=True):
            transformer.grad_checkpointing = was
