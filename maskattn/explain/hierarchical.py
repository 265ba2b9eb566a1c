"""Explanations of a slide model: relevance of tiles for a slide's classes, and of tokens inside any tile.

Pass 1 computes the tiles' relevance at the slide encoder, by any method that reads a last block, and the gradient γ_tc
of slide logit f_c at tile embedding z_t. Pass 2 explains, in any tile, the score z_t·γ_tc with γ held fixed, by the
same method. No graph spans the slide, and the cost is linear in the number of tiles.

With CDAM, γ is ∂f_c/∂z_t, and the tokens' relevance is the exact chain rule. With a complete method, γ is the mean of
that gradient along α·z, 0 ≤ α ≤ 1, so that Σ_t z_t·γ_tc = f_c(z) − f_c(0). In each tile z_t·γ_tc is the sum of its
tokens' relevance and of an unmapped remainder: the class token's own share and the score at the start of the path.
Summed over all tiles, tokens and remainders give f_c(slide) − f_c(slide of zero embeddings), up to a gap that shrinks
as the number of steps grows.

Dimension key: K classes, T kept tiles, B tiles of a batch, h·w tokens of a tile, H·W cells of the slide, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    """The terms of each class's sum: Σ of the map = f − f(baseline) − prefix − gap.

    Attributes:
        difference_K: (K,), f − f(baseline).
        prefix_K: (K,), the share of class token and registers, which no map shows.
        gap_K: (K,), the remainder: the error of the path's quadrature.
    """

    difference_K: Float[Tensor, "K"]
    prefix_K: Float[Tensor, "K"]
    gap_K: Float[Tensor, "K"]


@dataclass(frozen=True)
class PathSum:
    """The accuracy of γ, the mean gradient along the path of embeddings.

    Attributes:
        nodes: number of gradients computed for each score.
        gap_K: (K,), f(z) − f(0) − Σ z·γ.
    """

    nodes: int
    gap_K: Float[Tensor, "K"]


@dataclass(frozen=True)
class RelevanceMap:
    """The result of pass 1: relevance of a slide's kept tiles, in row-major order.

    Attributes:
        logits_K: (K,), the slide's logits.
        relevance_KT: (K, T), signed scores of the tiles.
        attention_T: (T,), the slide encoder's class-token row, mean over heads; 0 without a class token.
        gradient_KTC: (K, T, C), γ, the input of pass 2; None if it was not requested.
        sums: the terms that the maps sum to; None if the method is not complete.
        path: the accuracy of γ; None if no path was computed.
    """

    logits_K: Float[Tensor, "K"]
    relevance_KT: Float[Tensor, "K T"]
    attention_T: Float[Tensor, "T"]
    gradient_KTC: Float[Tensor, "K T C"] | None
    sums: SumOfMap | None = None
    path: PathSum | None = None


@dataclass(frozen=True)
class TokenMaps:
    """The result of pass 2: relevance of the tokens of B tiles; 0 at background.

    Attributes:
        relevance_KBHW: (K, B, h, w), signed scores for the slide's classes.
        attention_BHW: (B, h, w), the tile encoder's class-token row, mean over heads; 0 without a class token.
        unmapped_KB: (K, B), the remainder of z_t·γ_tc that no token holds: the share of the tile's class token and
            registers, and the score at the start of the path; None if the method is not complete.
    """

    relevance_KBHW: Float[Tensor, "K B h w"]
    attention_BHW: Float[Tensor, "B h w"]
    unmapped_KB: Float[Tensor, "K B"] | None = None


@dataclass(frozen=True)
class LevelMethod:
    """A method as applied at every level of a slide model.

    Attributes:
        method: an entry of :data:`maskattn.explain.METHODS`.
        explainer: the method's explainer, which takes the encoder as an argument; None if no level is a transformer.
        steps: nodes of the path of embeddings, if the method has one; None uses as many as necessary.
    """

    method: Method
    explainer: TokenExplainer | None
    steps: int | None = None

    @classmethod
    def named(cls, name: str, encoder: VisionTransformer | None, **options: Any) -> LevelMethod:
        """Look up a method by name.

        Raises:
            ValueError: there is no such method for slide models.
        """
        method = method_named(name, levels=True)
        explainer = None if encoder is None else method(encoder, **options)
        assert explainer is None or isinstance(explainer, TokenExplainer), "methods for levels read only the last block"
        return cls(method, explainer, options.get("m"))

    def explain(
        self, encoder: VisionTransformer, tokens: PackedTokens, target: Any
    ) -> tuple[Float[Tensor, "M T"], Account | None]:
        """Return the relevance of all packed tokens, and the terms of its sum if the method is complete, else None."""
        assert self.explainer is not None, "a level that is a transformer has an explainer"
        if not self.method.complete:
            return self.explainer.relevance(encoder, tokens, target), None
        account = self.explainer.account(encoder, tokens, target)
        return account.relevance_MT, account

    def path(
        self,
        scores_of: Callable[[Tensor], Float[Tensor, "K"]],
        z_TC: Float[Tensor, "T C"],
        *,
        keep: bool = True,
        group: ProcessGroup | None = None,
    ) -> PathGradient:
        """Compute γ: the gradient of each score at z, or, for a complete method, its mean along the path from 0 to z.

        Args:
            scores_of: embeddings → scores (K,).
            z_TC: (T, C), the embeddings.
            keep: whether γ itself is kept, or only z·γ of each row.
            group: the process group over which the embeddings are divided; None if this process has them all.
        """
        if not self.method.complete:
            return gradient_alone(scores_of, z_TC, keep=keep, group=group)
        return mean_gradient(scores_of, z_TC, nodes=self.steps, keep=keep, group=group)


class HierarchicalCDAM:
    """Explanations of a slide model for all its classes; for a HIPT, see :class:`maskattn.explain.ThreeLevelCDAM`.

    Args:
        model: a slide model in eval mode.
        method: a key of :data:`maskattn.explain.METHODS` that explains slide models; "cdam" is the paper's method.
        options: options of the method (``m``).

    Raises:
        ValueError: there is no such method for slide models.
    """

    def __init__(self, model: SlideModel, method: str = DEFAULT_METHOD, **options: Any) -> None:
        self.model = model
        self.level = LevelMethod.named(method, model.tile_encoder, **options)

    def tiles(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        keep_HW: Bool[Tensor, "H W"],
        *,
        gradient: bool = True,
        group: ProcessGroup | None = None,
    ) -> RelevanceMap:
        """Pass 1: compute the slide's logits and the relevance of each tile.

        Args:
            embeddings_TC: (T, C) from ``model.encode_tiles``, a row for each kept cell, in row-major order.
            keep_HW: (H, W) bool over the slide's cells.
            gradient: also compute the gradient that pass 2 needs: a backward pass through the slide encoder for each
                class, at each step of the path.
            group: as in :meth:`SlideModel.slide_tokens`; the map is then of this process's tiles, and the logits and
                sums are the same in all processes.

        Raises:
            ValueError: dropout is active (train mode), or embeddings and kept cells do not match.
            GroupError: the processes of the group disagree, or one of them has ended.
        """
        return explain_slide(self.model, self.level, embeddings_TC, keep_HW, gradient, group)

    @torch.inference_mode(False)
    def tokens(
        self,
        tiles_BIXY: UInt8[Tensor, "B 3 X Y"],
        keep_BHW: Bool[Tensor, "B h w"] | None,
        gradient_KBC: Float[Tensor, "K B C"],
    ) -> TokenMaps:
        """Pass 2: compute the relevance of each token of some tiles.

        Args:
            tiles_BIXY: (B, 3, tile_px, tile_px) uint8, RGB.
            keep_BHW: (B, h, w) bool over each tile's tokens; None keeps all.
            gradient_KBC: (K, B, C), the rows of :attr:`RelevanceMap.gradient_KTC` for these tiles.

        Raises:
            ValueError: dropout is active (train mode).
        """
        check_explainable(self.model)
        with torch.no_grad():
            tokens = self.model.tile_tokens(tiles_BIXY, keep_BHW)
        return explain_tokens(self.model.tile_encoder, self.level, tokens, gradient_KBC)


@torch.inference_mode(False)
def explain_tokens(
    encoder: VisionTransformer, level: LevelMethod, tokens: PackedTokens, gradient_KBC: Float[Tensor, "K B C"]
) -> TokenMaps:
    """Run pass 2 on tokens of tiles.

    Args:
        encoder: the tile encoder, whose output is the tiles' embeddings.
        level: the method.
        tokens: the input of the encoder's first block, computed without a graph.
        gradient_KBC: (K, B, C), γ of these tiles.
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
    group: ProcessGroup | None = None,
) -> RelevanceMap:
    """Run pass 1 over tiles or regions. Arguments as in :meth:`HierarchicalCDAM.tiles`; a group is for tiles alone.

    Raises:
        ValueError: dropout is active (train mode), or embeddings and kept cells do not match.
    """
    check_explainable(model)
    encoder, z = model.slide_encoder, embeddings_TC.detach().clone()
    assert isinstance(encoder, VisionTransformer), "levels that pool are explained by their gradient"
    place = (keep_HW,) if group is None else (keep_HW, group)
    with torch.no_grad():
        tokens = encoder.before_last_block(model.slide_tokens(z, *place))
        logits_K = encoder.predict(tokens)[0]
    gradient_KTC = path = None
    if gradient:
        found = level.path(lambda at: encoder(model.slide_tokens(at, *place))[0], z, group=group)
        gradient_KTC, path = found.gradient_KTC, path_sum(found)
    relevance_KT, account = level.explain(encoder, tokens, "all")
    P = tokens.own_prefix
    sums = None if account is None else SumOfMap(account.difference_BM[0], account.prefix_BM[0], account.gap_BM[0])
    return RelevanceMap(logits_K, relevance_KT[:, P:], mean_attention(encoder, tokens)[P:], gradient_KTC, sums, path)


def path_sum(found: PathGradient) -> PathSum | None:
    """Return the accuracy of γ; None for the gradient at z alone."""
    return PathSum(found.nodes, found.gap_K) if found.nodes else None


def products_with(gradient_KBC: Float[Tensor, "K B C"]) -> Callable[[Tensor], Tensor]:
    """Return a target whose scores (B, K) are the products of embeddings (B, C) with a fixed gradient."""
    fixed_KBC = gradient_KBC.detach().clone()
    return lambda z_BC: torch.einsum("bc,kbc->bk", z_BC, fixed_KBC)


@torch.no_grad()
def unmapped(
    encoder: VisionTransformer, tokens: PackedTokens, target: Callable[[Tensor], Tensor], account: Account
) -> Float[Tensor, "K B"]:
    """Return the part of each score that no token holds: the prefix tokens' share and the score at the path's start."""
    score_BK = target(encoder.predict(tokens))
    return (score_BK - account.difference_BM + account.prefix_BM).T


def mean_attention(encoder: VisionTransformer, tokens: PackedTokens) -> Float[Tensor, "T"]:
    """Return the class-token row of the last block, mean over heads; 0 without a class token."""
    if encoder.cls_token is None:
        return tokens.rows_TC.new_zeros(len(tokens.rows_TC))
    return attend_from_class_token(encoder, tokens).mean(dim=0)
