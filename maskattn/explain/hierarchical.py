"""Hierarchical CDAM: relevance of tiles for a slide's classes, and of tokens inside any tile.

With slide logit f_c and tile embeddings z_t, pass 1 gives the tiles' relevance at the slide encoder, and the gradient
γ_tc = ∂f_c/∂z_t. Pass 2 explains, in any tile, the score z_t·γ_tc with γ held fixed: the exact chain rule, so that the
tokens' relevance is that of the whole graph, without holding a graph over the slide. Linear in tiles, tile by tile.

Dimension key: K classes, T kept tiles, B tiles of a batch, h·w tokens of a tile, H·W cells of the slide, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskattn.explain.attention_maps import attend_from_class_token
from maskattn.explain.explainer import as_maps
from maskattn.explain.packed_model import check_explainable
from maskattn.explain.token_scores import score_tokens
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.hipt import HIPT
from maskattn.nn.slide_model import SlideModel
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = ["HierarchicalCDAM", "RelevanceMap", "TokenMaps", "explain_slide", "gradients_of", "products_with"]


@dataclass(frozen=True)
class RelevanceMap:
    """What pass 1 says of the kept tiles of a slide, row-major.

    Attributes:
        logits_K: (K,), the slide's logits.
        relevance_KT: (K, T), signed scores of the tiles.
        attention_T: (T,), the slide encoder's class-token row, mean over heads; 0 where there is no class token.
        gradient_KTC: (K, T, C), ∂ logit / ∂ embedding, which pass 2 takes; None where it was not asked for.
    """

    logits_K: Float[Tensor, "K"]
    relevance_KT: Float[Tensor, "K T"]
    attention_T: Float[Tensor, "T"]
    gradient_KTC: Float[Tensor, "K T C"] | None


@dataclass(frozen=True)
class TokenMaps:
    """What pass 2 says of the tokens of B tiles; 0 at background.

    Attributes:
        relevance_KBHW: (K, B, h, w), signed scores for the slide's classes.
        attention_BHW: (B, h, w), the tile encoder's class-token row, mean over heads; 0 without a class token.
    """

    relevance_KBHW: Float[Tensor, "K B h w"]
    attention_BHW: Float[Tensor, "B h w"]


class HierarchicalCDAM:
    """Explanations of a slide model, for all its classes at once. For a HIPT: :class:`maskattn.explain.ThreeLevelCDAM`.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: SlideModel) -> None:
        self.model = model

    def tiles(
        self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"], *, gradient: bool = True
    ) -> RelevanceMap:
        """Pass 1: the slide's logits and the relevance of each tile.

        Args:
            embeddings_TC: (T, C) from ``model.encode_tiles``, a row for each kept cell, row-major.
            keep_HW: (H, W) bool over the slide's cells.
            gradient: also take the gradient that pass 2 needs: a backward through the slide encoder for each class.
        """
        return explain_slide(self.model, embeddings_TC, keep_HW, gradient)

    @torch.inference_mode(False)
    def tokens(
        self,
        tiles_BIXY: UInt8[Tensor, "B 3 X Y"],
        keep_BHW: Bool[Tensor, "B h w"] | None,
        gradient_KBC: Float[Tensor, "K B C"],
    ) -> TokenMaps:
        """Pass 2: the relevance of each token of some tiles.

        Args:
            tiles_BIXY: (B, 3, tile_px, tile_px) uint8, RGB.
            keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.
            gradient_KBC: these tiles' part of :attr:`RelevanceMap.gradient_KTC`.

        Raises:
            ValueError: the model drops at random (train mode).
        """
        check_explainable(self.model)
        encoder = self.model.tile_encoder
        with torch.no_grad():
            tokens = encoder.before_last_block(self.model.tile_tokens(tiles_BIXY, keep_BHW))
        relevance_KT, _ = score_tokens(encoder, tokens, products_with(gradient_KBC))
        attention_BHW = as_maps(_mean_attention(encoder, tokens)[None], tokens)[:, 0]
        return TokenMaps(as_maps(relevance_KT, tokens).transpose(0, 1), attention_BHW)


@torch.inference_mode(False)
def explain_slide(
    model: SlideModel | HIPT, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"], gradient: bool
) -> RelevanceMap:
    """Pass 1, over tiles or regions. Arguments as in :meth:`HierarchicalCDAM.tiles`.

    Raises:
        ValueError: the model drops at random (train mode), or embeddings and kept cells do not match.
    """
    check_explainable(model)
    encoder = model.slide_encoder
    z = embeddings_TC.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        tokens = encoder.before_last_block(model.slide_tokens(z, keep_HW))
        gradient_KTC = gradients_of(encoder.predict(tokens)[0], z) if gradient else None
    tokens = tokens.with_rows(tokens.rows_TC.detach())
    relevance_KT, logits_1K = score_tokens(encoder, tokens, "all")
    P = tokens.num_prefix
    return RelevanceMap(logits_1K[0], relevance_KT[:, P:], _mean_attention(encoder, tokens)[P:], gradient_KTC)


def products_with(gradient_KBC: Float[Tensor, "K B C"]) -> Callable[[Tensor], Tensor]:
    """The target whose scores (B, K) are the products of embeddings (B, C) with a gradient that is held fixed."""
    fixed_KBC = gradient_KBC.detach().clone()
    return lambda z_BC: torch.einsum("bc,kbc->bk", z_BC, fixed_KBC)


def gradients_of(scores_K: Float[Tensor, "K"], z_TC: Float[Tensor, "T C"]) -> Float[Tensor, "K T C"]:
    """∂ score / ∂z for each class, a backward for each."""
    K = len(scores_K)
    return torch.stack([torch.autograd.grad(scores_K[c], z_TC, retain_graph=c + 1 < K)[0] for c in range(K)])


def _mean_attention(encoder: VisionTransformer, tokens: PackedTokens) -> Float[Tensor, "T"]:
    if encoder.cls_token is None:
        return tokens.rows_TC.new_zeros(len(tokens.rows_TC))
    return attend_from_class_token(encoder, tokens).mean(dim=0)
