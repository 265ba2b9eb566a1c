"""Integrated CDAM: CDAM averaged along a path from zero to the prediction.

The backbone runs once. On the paths "norm", "weights" and "value" all steps share one set of keys and values
(:mod:`maskattn.explain.norm_path`, :mod:`maskattn.explain.weights_path`, :mod:`maskattn.explain.value_path`).
Otherwise each of the m steps runs the tail (last block, norm, head), in batches.

Source: Brocki, Binda, Chung, arXiv 2312.02364, for the path "input"; the other paths are this package's.

Dimension key: B images, T packed tokens, M maps, m steps, C channels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from maskattn.explain.explainer import Account, TokenExplainer, sum_of_grid
from maskattn.explain.last_block import input_of_attention, output_from, reads_class_token_alone
from maskattn.explain.norm_path import keys_are_proportional, score_tokens_on_norm_path
from maskattn.explain.smooth import check_counts
from maskattn.explain.targets import Target, select_scores
from maskattn.explain.token_scores import score_class_token_queries, score_tokens
from maskattn.explain.token_subsets import batches, copies_at_once, repeat_tokens, target_of_copies
from maskattn.explain.value_path import score_tokens_on_value_path, value_path_difference
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["IntegratedCDAM", "gauss_legendre", "score_difference", "sum_of_all"]


class IntegratedCDAM(TokenExplainer):
    """CDAM averaged along a straight path from zero to the prediction.

    There are four paths. "input" is the authors': the last block's input is scaled by k/m, k = 1 … m, and T is its
    norm. The norm undoes the scaling, so that T hardly moves and the map has no meaningful sum. "norm" scales T itself,
    at the nodes of Gauss–Legendre quadrature. It is Integrated Gradients in T with a baseline of 0: the scores of all
    tokens sum to f(T) − f(0). ``return_convergence_gap`` measures the error f(T) − f(0) − Σ_i S_i over all tokens,
    prefix tokens included. "weights" follows the same path and has the same sum, but attributes changes of attention
    weights instead of attention scores, so that it does not depend on the zero of the scores
    (:mod:`maskattn.explain.weights_path`). "value" holds the attention fixed and scales the values, starting from those
    of tokens of 0 (:mod:`maskattn.explain.value_path`). It is complete as well, and omits CDAM's key term, which has
    the sign of the raw scores.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        m: number of steps along the path.
        path: "input", "norm", "weights" or "value".
        internal_batch_size: copies of images that go through the last block at a time, at least one copy of the whole
            batch; None takes as many as have 8,192 tokens together, or 64 if only their class tokens go through. It
            bounds the memory and does not change the result beyond rounding.

    Raises:
        TypeError, ValueError: the model cannot be explained, a number is out of range, or there is no such path.
    """

    def __init__(
        self,
        model: nn.Module,
        m: int = 50,
        path: Literal["input", "norm", "weights", "value"] = "input",
        *,
        internal_batch_size: int | None = None,
    ) -> None:
        check_counts(m, internal_batch_size)
        if path not in ("input", "norm", "weights", "value"):
            raise ValueError(f"path must be 'input', 'norm', 'weights' or 'value', got path={path!r}")
        super().__init__(model)
        self.m = m
        self.path = path
        self.internal_batch_size = internal_batch_size

    def relevance(  # noqa: D102 (as of TokenExplainer)
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, generator: torch.Generator | None = None
    ) -> Tensor:
        return self._relevance(model, tokens, target, with_queries=False)[0]

    def account(self, model: VisionTransformer, tokens: PackedTokens, target: Target) -> Account:
        """Compute the scores and the terms of their sum. Arguments as in :meth:`relevance`.

        Raises:
            ValueError: the path is "input", which has no such sum.
        """
        if self.path == "input":
            raise ValueError(
                "the path 'input' does not converge to a difference of scores, so it has no convergence gap; "
                "use IntegratedCDAM(path='norm')"
            )
        relevance_MT, queries_BM = self._relevance(model, tokens, target, with_queries=True)
        of_grid_BM = sum_of_grid(relevance_MT, tokens)
        prefix_BM = queries_BM + sum_of_all(relevance_MT, tokens) - of_grid_BM
        difference = value_path_difference if self.path == "value" else score_difference
        difference_BM = difference(model, tokens, target)
        return Account(relevance_MT, prefix_BM, difference_BM, difference_BM - of_grid_BM - prefix_BM)

    def _relevance(
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, with_queries: bool
    ) -> tuple[Float[Tensor, "M T"], Float[Tensor, "B M"]]:
        """Return the scores of all tokens, and the class tokens' share through their queries if requested, else 0."""
        B, size, total = tokens.packing.batch_size, self.internal_batch_size, None
        if self.path == "value":
            relevance = score_tokens_on_value_path(model, tokens, target, *gauss_legendre(self.m, tokens.rows_TC), size)
            return relevance, relevance.new_zeros(B, len(relevance))
        if self.path == "norm":
            return score_tokens_integrated(model, tokens, target, self.m, size, with_queries=with_queries)
        if self.path == "weights":  # the weights include the effect of the queries
            return score_tokens_integrated(model, tokens, target, self.m, size, in_weights=True)
        for chunk in batches(self.m, copies_at_once(tokens, size)):
            scales = torch.arange(chunk.start + 1, chunk.stop + 1, device=tokens.rows_TC.device) / self.m
            many = repeat_tokens(tokens, len(scales))
            many = many.with_rows(torch.cat([scale * tokens.rows_TC for scale in scales.to(tokens.rows_TC)]))
            relevance, _ = score_tokens(model, many, target_of_copies(target, B))
            of_copies = relevance.unflatten(1, (len(scales), -1)).sum(dim=1)
            total = of_copies if total is None else total + of_copies
        assert total is not None, "m is at least 1"
        return total / self.m, total.new_zeros(B, len(total))


def score_tokens_integrated(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    m: int,
    internal_batch_size: int | None = None,
    *,
    with_queries: bool = False,
    in_weights: bool = False,
) -> tuple[Float[Tensor, "M T"], Float[Tensor, "B M"]]:
    """Compute Integrated Gradients of the scores in T, with a baseline of 0, by m nodes of Gauss–Legendre quadrature.

    Args:
        model: the vision transformer.
        tokens: the output of ``model.before_last_block``.
        target: see :func:`maskattn.explain.targets.select_scores`.
        m: number of nodes.
        internal_batch_size: see :class:`IntegratedCDAM`.
        with_queries: also return the share of the class tokens' scores that goes through their queries.
        in_weights: attribute changes of attention weights, see :mod:`maskattn.explain.weights_path`.

    Returns:
        S (M, T), prefix tokens included, and the queries' share (B, M), 0 if it was not requested.
    """
    alphas, weights = gauss_legendre(m, tokens.rows_TC)
    if reads_class_token_alone(model) and keys_are_proportional(model, tokens):
        copies = copies_at_once(tokens, internal_batch_size, class_tokens=True)
        return score_tokens_on_norm_path(model, tokens, target, alphas, weights, copies, with_queries, in_weights)
    B = tokens.packing.batch_size
    with torch.no_grad():
        normed = input_of_attention(model, tokens)
    total: Tensor | None = None
    queries: Tensor | float = 0.0
    for chunk in batches(m, copies_at_once(tokens, internal_batch_size)):
        of_copies, scale = target_of_copies(target, B), (weights[chunk] / alphas[chunk]).to(normed)
        many = repeat_tokens(tokens, len(scale))
        scaled = torch.cat([alpha * normed for alpha in alphas[chunk]])
        relevance, _ = score_tokens(model, many, of_copies, scaled, in_weights)
        of_chunk = torch.einsum("m,cmt->ct", scale.to(relevance), relevance.unflatten(1, (len(scale), -1)))
        total = of_chunk if total is None else total + of_chunk
        if with_queries and reads_class_token_alone(model):
            of_queries = score_class_token_queries(model, many, of_copies, scaled).unflatten(0, (len(scale), B))
            queries = queries + torch.einsum("m,mbc->bc", scale.to(of_queries), of_queries)
    assert total is not None, "m is at least 1"
    return total, queries + total.new_zeros(B, len(total))


def gauss_legendre(m: int, like: Tensor) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Return the nodes and weights of the quadrature on [0, 1], (m,) each, with the dtype and device of ``like``."""
    at, weight = np.polynomial.legendre.leggauss(m)
    return torch.from_numpy((at + 1) / 2).to(like), torch.from_numpy(weight / 2).to(like)


@torch.no_grad()
def score_difference(model: VisionTransformer, tokens: PackedTokens, target: Target) -> Float[Tensor, "B M"]:
    """Compute f(T) − f(0), the sum of the scores of all tokens on the paths "norm" and "weights"."""
    normed = input_of_attention(model, tokens)

    def scores(at: Tensor) -> Tensor:
        block = model.last_block
        if not reads_class_token_alone(model):
            return select_scores(output_from(model, tokens, at), target)
        read = block.read_attention(tokens, at).out_B1HD
        return select_scores(model.predict_from_class_token(block.finish(tokens, read)), target)

    return scores(normed) - scores(torch.zeros_like(normed))


def sum_of_all(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M"]:
    """Return the sum over each image's packed tokens, prefix tokens included."""
    sums = values_MT.new_zeros(tokens.packing.batch_size, len(values_MT))
    return tokens.of_all(sums.index_add_(0, tokens.packing.sequence_of_token, values_MT.T))
