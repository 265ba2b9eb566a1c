"""The score of every token for every target: S_i = Σ_j T_ij · ∂f/∂T_ij, T the input of the last block's attention.

Two ways to the same number:

- closed form, for models that read the class token alone: a backward through one token's projection, MLP and head
  for each target, then ``token_relevance`` for all of them in one pass over keys and values. It takes the derivatives
  of k and v along T: k − b_k and v − b_v where both are affine in T, through the k norm and the rotation where not.
- autograd through the last block, for mean-pooled models, whose prediction reads every token, and for models on
  whose last block something hangs (a hook, an adapter such as LoRA), whose weights alone do not say what it does.

The closed form leaves out what a class token does as a query; ``score_class_token_queries`` is that part.

Source: Brocki, Binda, Chung, arXiv 2312.02364, for S; the closed form is this package's.

Dimension key: B images, T packed tokens, M targets, H heads, D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from maskattn.attention.api import readout, token_relevance
from maskattn.explain.last_block import input_of_attention, output_from, reads_class_token_alone
from maskattn.explain.targets import Target, select_scores
from maskattn.explain.weights_path import along, origin_of_weights, relevance_of_parts
from maskattn.nn.blocks import ClassTokenAttention, PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = [
    "gradients_of_reads",
    "gradients_of_scores",
    "score_class_token_queries",
    "score_tokens",
    "score_tokens_by_autograd",
    "score_tokens_in_closed_form",
]

_LEAST_TOGETHER = 4
_NUMBERS_TOGETHER = 1 << 20


def score_tokens(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    normed_TC: Float[Tensor, "T C"] | None = None,
    in_weights: bool = False,
) -> tuple[Float[Tensor, "M T"], Float[Tensor, "B M"]]:
    """Relevance of each packed token for each target, by whichever way covers the model.

    Args:
        model: the vision transformer.
        tokens: what ``model.before_last_block`` gave.
        target: see :func:`maskattn.explain.targets.select_scores`.
        normed_TC: (T, C), in place of T, what the first norm gives.
        in_weights: tell the attention in its weights: see :mod:`maskattn.explain.weights_path`.

    Returns:
        S (M, T), prefix tokens among the T, and the scores (B, M) that were explained.
    """
    if in_weights and not reads_class_token_alone(model):
        normed_TC = input_of_attention(model, tokens) if normed_TC is None else normed_TC
        return relevance_of_parts(model, tokens, target, normed_TC)
    if in_weights:
        return score_tokens_in_closed_form(model, tokens, target, normed_TC, in_weights=True)
    way = score_tokens_in_closed_form if reads_class_token_alone(model) else score_tokens_by_autograd
    return way(model, tokens, target, normed_TC)


def score_tokens_in_closed_form(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    normed_TC: Tensor | None = None,
    in_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """The closed form above. Arguments and results as in :func:`score_tokens`."""
    block = model.last_block
    with torch.no_grad():
        read = block.read_attention(tokens, normed_TC)
    key_origin = _origin_of_weights(model, tokens, read, normed_TC) if in_weights else read.key_origin
    out = read.out_B1HD.detach().requires_grad_()
    fixed = tokens.with_rows(tokens.rows_TC.detach())
    with torch.enable_grad():
        scores_BM = select_scores(model.predict_from_class_token(block.finish(fixed, out)), target)
    gradients = gradients_of_reads(scores_BM, out, target)
    relevance = token_relevance(
        read.q_B1HD,
        read.k_THD,
        read.v_THD,
        out,
        read.lse_B1H,
        gradients,
        tokens.packing.cu_seqlens,
        tokens.packing.max_seqlen,
        key_origin=key_origin,
        value_origin=read.value_origin,
        impl=block.attn.impl,
    )
    return relevance, scores_BM.detach()


def _origin_of_weights(
    model: VisionTransformer, tokens: PackedTokens, read: ClassTokenAttention, normed_TC: Tensor | None
) -> Tensor:
    block, packing = model.last_block, tokens.packing
    normed = tokens.with_rows(block.norm1(tokens.rows_TC) if normed_TC is None else normed_TC)
    first = normed.first().detach().requires_grad_()
    with torch.enable_grad():
        grown = along(block.attn.class_token_queries(first), first)
    lengths = packing.cu_seqlens, packing.max_seqlen
    _, rows_1HT = readout(read.q_B1HD, read.k_THD, read.v_THD, *lengths, return_rows=True, impl=block.attn.impl)
    k_along = read.k_THD if read.key_origin is None else read.k_THD - read.key_origin
    return origin_of_weights(read.q_B1HD[:, 0], grown[:, 0], read.k_THD, k_along, rows_1HT[0], packing)


def score_tokens_by_autograd(
    model: VisionTransformer, tokens: PackedTokens, target: Target, normed_TC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A backward through the last block for each target. Arguments and results as in :func:`score_tokens`."""
    tokens = tokens.with_rows(tokens.rows_TC.detach())
    with torch.enable_grad():
        normed = input_of_attention(model, tokens) if normed_TC is None else normed_TC
        normed = normed.detach().requires_grad_()
        scores_BM = select_scores(output_from(model, tokens, normed), target)
    relevance = normed.new_empty(scores_BM.shape[1], len(normed))
    for row, (gradient,) in zip(relevance, gradients_of_scores(scores_BM, (normed,)), strict=True):
        row.copy_((normed.detach() * gradient).sum(dim=1))
    return relevance, scores_BM.detach()


def score_class_token_queries(
    model: VisionTransformer, tokens: PackedTokens, target: Target, normed_TC: Float[Tensor, "T C"]
) -> Float[Tensor, "B M"]:
    """The part of the class tokens' scores that goes through their queries; it is no part of any map.

    Arguments as in :func:`score_tokens`.
    """
    block, packing = model.last_block, tokens.packing
    normed = tokens.with_rows(normed_TC.detach())
    fixed = tokens.with_rows(tokens.rows_TC.detach())
    first = normed.first().requires_grad_()
    with torch.enable_grad():
        k, v = (x.detach() for x in block.attn.keys_and_values(normed))
        q = block.attn.class_token_queries(first)
        out = cast(Tensor, readout(q, k, v, packing.cu_seqlens, packing.max_seqlen, impl=block.attn.impl))
        scores_BM = select_scores(model.predict_from_class_token(block.finish(fixed, out)), target)
    parts = [(first.detach() * g).sum(dim=(1, 2)) for (g,) in gradients_of_scores(scores_BM, (first,))]
    return torch.stack(parts, dim=1)


def gradients_of_scores(scores_BM: Float[Tensor, "B M"], leaves: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """∂(Σ_b score_bm)/∂x of each leaf x, one target m after the other; images do not mix, so the sum keeps them apart.

    A target function that does not depend on the output gives zeros.
    """
    count = scores_BM.shape[1]
    for m in range(count):
        if scores_BM.requires_grad:
            with torch.enable_grad():
                total = scores_BM[:, m].sum()
            yield torch.autograd.grad(total, leaves, retain_graph=m + 1 < count, materialize_grads=True)
        else:
            yield tuple(torch.zeros_like(x) for x in leaves)


def gradients_of_reads(
    scores_BM: Float[Tensor, "B M"], read: Float[Tensor, "B R H D"], target: Target
) -> Float[Tensor, "M B R H D"]:
    """∂(Σ_b score_bm)/∂x of what class tokens read, for many targets in one backward.

    Between a class token's reading and its scores lie a projection, an MLP and the head, on a few rows: a backward for
    each of 1,000 classes would spend its time on calls. Targets go together as far as their rows do not fill memory; a
    target function, which may hold anything, is differentiated one target after the other.

    Args:
        scores_BM: (B, M), computed from ``read``.
        read: what was read, which the scores have a graph to.
        target: what the scores are of.
    """
    count = scores_BM.shape[1]
    if callable(target) or not scores_BM.requires_grad or count < _LEAST_TOGETHER:
        return torch.stack([gradient for (gradient,) in gradients_of_scores(scores_BM, (read,))])
    one_hot = torch.eye(count, dtype=scores_BM.dtype, device=scores_BM.device)[:, None].expand(-1, len(scores_BM), -1)
    together = max(1, _NUMBERS_TOGETHER // max(1, read.numel()))
    parts = [
        torch.autograd.grad(scores_BM, read, part, retain_graph=True, is_grads_batched=True, materialize_grads=True)[0]
        for part in one_hot.split(together)
    ]
    return torch.cat(parts)
