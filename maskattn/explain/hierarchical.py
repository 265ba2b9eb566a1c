"""Explanations of a slide model: relevance of tiles for a slide's classes, and of tokens inside any tile.

Pass 1 gives the tiles' relevance at the slide encoder, by any method that reads a last block, and the gradient γ_tc of
slide logit f_c at tile embedding z_t. Pass 2 explains, in any tile, the score z_t·γ_tc with γ held fixed, by the same
method. Nothing holds a graph over the slide, and the cost is linear in tiles, tile by tile.

With CDAM γ is ∂f_c/∂z_t, and the tokens' relevance is the exact chain rule. With a complete method it is the mean of
that gradient along α·z, 0 ≤ α ≤ 1, so that Σ_t z_t·γ_tc = f_c(z) − f_c(0); and in each tile z_t·γ_tc is the sum of its
tokens' relevance and of what is on no token: the class token's own, and the score with which the path begins. So the
sums of all tokens of all tiles, and of these, are f_c(slide) − f_c(slide of embeddings 0), to a gap that shrinks as the
steps grow.

Dimension key: K classes, T kept tiles, B tiles of a batch, h·w tokens of a tile, H·W cells of the slide, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskattn.explain.attention_maps import attend_from_class_token
from maskattn.explain.embedding_path import PathGradient, gradient_alone, mean_gradient
from maskattn.explain.explainer import Account, TokenExplainer, as_maps
from maskattn.explain.methods import DEFAULT_METHOD, Method, method_named
from maskattn.explain.packed_model import check_explainable
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.hipt import HIPT
from maskattn.nn.slide_model import SlideModel
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = [
    "HierarchicalCDAM",
    "LevelMethod",
    "PathSum",
    "RelevanceMap",
    "SumOfMap",
    "TokenMaps",
    "explain_slide",
    "explain_tokens",
    "mean_attention",
    "path_sum",
    "products_with",
    "unmapped",
]


@dataclass(frozen=True)
class SumOfMap:
    """What the map of each class sums to: Σ of the map = f − f(baseline) − prefix − gap.

    Attributes:
        difference_K: (K,), f − f(baseline).
        prefix_K: (K,), the part of class token and registers, which no map shows.
        gap_K: (K,), what is left over: the error of the path's steps.
    """

    difference_K: Float[Tensor, "K"]
    prefix_K: Float[Tensor, "K"]
    gap_K: Float[Tensor, "K"]


@dataclass(frozen=True)
class PathSum:
    """How well γ, the mean gradient along the path of embeddings, accounts for the scores.

    Attributes:
        nodes: gradients of each score that were taken.
        gap_K: (K,), f(z) − f(0) − Σ z·γ.
    """

    nodes: int
    gap_K: Float[Tensor, "K"]


@dataclass(frozen=True)
class RelevanceMap:
    """What pass 1 says of the kept tiles of a slide, row-major.

    Attributes:
        logits_K: (K,), the slide's logits.
        relevance_KT: (K, T), signed scores of the tiles.
        attention_T: (T,), the slide encoder's class-token row, mean over heads; 0 where there is no class token.
        gradient_KTC: (K, T, C), γ, which pass 2 takes; None where it was not asked for.
        sums: what the maps sum to; None where the method promises nothing.
        path: of γ; None where none was taken.
    """

    logits_K: Float[Tensor, "K"]
    relevance_KT: Float[Tensor, "K T"]
    attention_T: Float[Tensor, "T"]
    gradient_KTC: Float[Tensor, "K T C"] | None
    sums: SumOfMap | None = None
    path: PathSum | None = None


@dataclass(frozen=True)
class TokenMaps:
    """What pass 2 says of the tokens of B tiles; 0 at background.

    Attributes:
        relevance_KBHW: (K, B, h, w), signed scores for the slide's classes.
        attention_BHW: (B, h, w), the tile encoder's class-token row, mean over heads; 0 without a class token.
        unmapped_KB: (K, B), the part of z_t·γ_tc that is on no token: the tile's own class token and registers, and
            the score with which the path begins; None where the method promises no sum.
    """

    relevance_KBHW: Float[Tensor, "K B h w"]
    attention_BHW: Float[Tensor, "B h w"]
    unmapped_KB: Float[Tensor, "K B"] | None = None


@dataclass(frozen=True)
class LevelMethod:
    """A method as every level of a slide model uses it.

    Attributes:
        method: of the list.
        explainer: made for some encoder, and told which one to explain; None where no level is a transformer.
        steps: nodes of the path of embeddings, where the method has one; None as many as it takes.
    """

    method: Method
    explainer: TokenExplainer | None
    steps: int | None = None

    @classmethod
    def named(cls, name: str, encoder: VisionTransformer | None, **options: Any) -> LevelMethod:
        """The method of this name.

        Raises:
            ValueError: there is none for slide models.
        """
        method = method_named(name, levels=True)
        explainer = None if encoder is None else method(encoder, **options)
        assert explainer is None or isinstance(explainer, TokenExplainer), (
            "methods for levels read the last block alone"
        )
        return cls(method, explainer, options.get("m"))

    def explain(
        self, encoder: VisionTransformer, tokens: PackedTokens, target: Any
    ) -> tuple[Float[Tensor, "M T"], Account | None]:
        """The relevance of all packed tokens, and what it sums to, where the method is complete."""
        assert self.explainer is not None, "a level that is a transformer has an explainer"
        if not self.method.complete:
            return self.explainer.relevance(encoder, tokens, target), None
        account = self.explainer.account(encoder, tokens, target)
        return account.relevance_MT, account

    def path(
        self, scores_of: Callable[[Tensor], Float[Tensor, "K"]], z_TC: Float[Tensor, "T C"], *, keep: bool = True
    ) -> PathGradient:
        """γ: the gradient of each score at z, or, for a complete method, its mean along the path from 0 to z.

        Args:
            scores_of: embeddings → scores (K,).
            z_TC: the embeddings.
            keep: whether γ is kept, and not only z·γ of each row.
        """
        if not self.method.complete:
            return gradient_alone(scores_of, z_TC, keep=keep)
        return mean_gradient(scores_of, z_TC, nodes=self.steps, keep=keep)


class HierarchicalCDAM:
    """Explanations of a slide model, for all its classes at once. For a HIPT: :class:`maskattn.explain.ThreeLevelCDAM`.

    Args:
        model: in eval mode.
        method: of :data:`maskattn.explain.METHODS`, one that explains slide models; "cdam" is the paper's.
        options: of the method (``m``).

    Raises:
        ValueError: there is no such method for slide models.
    """

    def __init__(self, model: SlideModel, method: str = DEFAULT_METHOD, **options: Any) -> None:
        self.model = model
        self.level = LevelMethod.named(method, model.tile_encoder, **options)

    def tiles(
        self, embeddings_TC: Float[Tensor, "T C"], keep_HW: Bool[Tensor, "H W"], *, gradient: bool = True
    ) -> RelevanceMap:
        """Pass 1: the slide's logits and the relevance of each tile.

        Args:
            embeddings_TC: (T, C) from ``model.encode_tiles``, a row for each kept cell, row-major.
            keep_HW: (H, W) bool over the slide's cells.
            gradient: also take the gradient that pass 2 needs: a backward through the slide encoder for each class,
                at each step of the path.
        """
        return explain_slide(self.model, self.level, embeddings_TC, keep_HW, gradient)

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
        with torch.no_grad():
            tokens = self.model.tile_tokens(tiles_BIXY, keep_BHW)
        return explain_tokens(self.model.tile_encoder, self.level, tokens, gradient_KBC)


@torch.inference_mode(False)
def explain_tokens(
    encoder: VisionTransformer, level: LevelMethod, tokens: PackedTokens, gradient_KBC: Float[Tensor, "K B C"]
) -> TokenMaps:
    """Pass 2, for tiles as a tile encoder starts with them.

    Args:
        encoder: the tile encoder, whose output is the tiles' embeddings.
        level: the method.
        tokens: with which its first block starts, made without a graph.
        gradient_KBC: γ of these tiles.
    """
    target = products_with(gradient_KBC)
    with torch.no_grad():
        tokens = encoder.before_last_block(tokens)
    relevance_KT, account = level.explain(encoder, tokens, target)
    attention_BHW = as_maps(mean_attention(encoder, tokens)[None], tokens)[:, 0]
    unmapped_KB = None if account is None else unmapped(encoder, tokens, target, account)
    return TokenMaps(as_maps(relevance_KT, tokens).transpose(0, 1), attention_BHW, unmapped_KB)


@torch.inference_mode(False)
def explain_slide(
    model: SlideModel | HIPT,
    level: LevelMethod,
    embeddings_TC: Float[Tensor, "T C"],
    keep_HW: Bool[Tensor, "H W"],
    gradient: bool,
) -> RelevanceMap:
    """Pass 1, over tiles or regions. Arguments as in :meth:`HierarchicalCDAM.tiles`.

    Raises:
        ValueError: the model drops at random (train mode), or embeddings and kept cells do not match.
    """
    check_explainable(model)
    encoder, z = model.slide_encoder, embeddings_TC.detach().clone()
    assert isinstance(encoder, VisionTransformer), "levels that pool are explained by their gradient"
    with torch.no_grad():
        tokens = encoder.before_last_block(model.slide_tokens(z, keep_HW))
        logits_K = encoder.predict(tokens)[0]
    gradient_KTC = path = None
    if gradient:
        found = level.path(lambda at: encoder(model.slide_tokens(at, keep_HW))[0], z)
        gradient_KTC, path = found.gradient_KTC, path_sum(found)
    relevance_KT, account = level.explain(encoder, tokens, "all")
    P = tokens.num_prefix
    sums = None if account is None else SumOfMap(account.difference_BM[0], account.prefix_BM[0], account.gap_BM[0])
    return RelevanceMap(logits_K, relevance_KT[:, P:], mean_attention(encoder, tokens)[P:], gradient_KTC, sums, path)


def path_sum(found: PathGradient) -> PathSum | None:
    """How well γ accounts for the scores; None of a gradient at z alone."""
    return PathSum(found.nodes, found.gap_K) if found.nodes else None


def products_with(gradient_KBC: Float[Tensor, "K B C"]) -> Callable[[Tensor], Tensor]:
    """The target whose scores (B, K) are the products of embeddings (B, C) with a gradient that is held fixed."""
    fixed_KBC = gradient_KBC.detach().clone()
    return lambda z_BC: torch.einsum("bc,kbc->bk", z_BC, fixed_KBC)


@torch.no_grad()
def unmapped(
    encoder: VisionTransformer, tokens: PackedTokens, target: Callable[[Tensor], Tensor], account: Account
) -> Float[Tensor, "K B"]:
    """What of each score is on no token: the prefix tokens' part, and the score with which the path begins."""
    score_BK = target(encoder.predict(tokens))
    return (score_BK - account.difference_BM + account.prefix_BM).T


def mean_attention(encoder: VisionTransformer, tokens: PackedTokens) -> Float[Tensor, "T"]:
    """The class-token row of the last block, mean over heads; 0 without a class token."""
    if encoder.cls_token is None:
        return tokens.rows_TC.new_zeros(len(tokens.rows_TC))
    return attend_from_class_token(encoder, tokens).mean(dim=0)
