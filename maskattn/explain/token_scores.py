"""The score of every token for every target: S_i = Σ_j T_ij · ∂f/∂T_ij, T the input of the last block's attention.

There are two ways to compute the same number:

- The closed form, for models that read only the class token, takes a backward pass through one token's projection, MLP
  and head for each target, then ``token_relevance`` for all of them in one pass over keys and values. It needs the
  derivatives of k and v along T. These are k − b_k and v − b_v if both are affine in T; otherwise they are taken
  through the k norm and the rotation.
- Autograd through the last block, for mean-pooled models, whose prediction reads every token, and for models whose last
  block has a hook or an adapter such as LoRA, because its weights alone do not determine its output.

The closed form omits the class token's share as a query, which ``score_class_token_queries`` computes.

Source: Brocki, Binda, Chung, arXiv 2312.02364, for S; the closed form is this package's.

Dimension key: B images, T packed tokens, M targets, H heads, D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

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
    """Compute the relevance of each packed token for each target, in the closed form if the model allows it.

    Args:
        model: the vision transformer.
        tokens: the output of ``model.before_last_block``.
        target: see :func:`maskattn.explain.targets.select_scores`.
        normed_TC: (T, C), replaces T, the output of the first norm.
        in_weights: attribute changes of attention weights, see :mod:`maskattn.explain.weights_path`.

    Returns:
        S (M, T), prefix tokens included, and the scores (B, M) that were explained.
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
    """Compute S in the closed form. Arguments and results as in :func:`score_tokens`."""
    block = model.last_block
    with torch.no_grad():
        read = block.read_attention(tokens, normed_TC)
    key_origin = _origin_of_weights(model, tokens, read, normed_TC) if in_weights else read.key_origin
    out = read.out_B1HD.detach().requires_grad_()
    fixed = tokens.with_rows(tokens.rows_TC.detach())
    with torch.enable_grad():
        scores_BM = select_scores(model.predict_from_class_token(block.finish(fixed, out)), target)
    gradients = gradients_of_reads(scores_BM, out, target)
    relevance = tokens.relevance(
        read.q_B1HD,
        read.k_THD,
        read.v_THD,
        out,
        read.lse_B1H,
        gradients,
        key_origin=key_origin,
        value_origin=read.value_origin,
        impl=block.attn.impl,
    )
    return relevance, scores_BM.detach()


def _origin_of_weights(
    model: VisionTransformer, tokens: PackedTokens, read: ClassTokenAttention, normed_TC: Tensor | None
) -> Tensor:
    block = model.last_block
    normed = tokens.with_rows(block.norm1(tokens.rows_TC) if normed_TC is None else normed_TC)
    first = normed.first().detach().requires_grad_()
    with torch.enable_grad():
        grown = along(block.attn.class_token_queries(first), first)
    _, rows_1HT = tokens.read(read.q_B1HD, read.k_THD, read.v_THD, return_rows=True, impl=block.attn.impl)
    k_along = read.k_THD if read.key_origin is None else read.k_THD - read.key_origin
    return origin_of_weights(read.q_B1HD[:, 0], grown[:, 0], read.k_THD, k_along, rows_1HT[0], tokens)


def score_tokens_by_autograd(
    model: VisionTransformer, tokens: PackedTokens, target: Target, normed_TC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute S by a backward pass through the last block for each target; see :func:`score_tokens`."""
    tokens = tokens.with_rows(tokens.rows_TC.detach())
    with torch.enable_grad():
        normed = input_of_attention(model, tokens) if normed_TC is None else normed_TC
        normed = normed.detach().requires_grad_()
        scores_BM = tokens.counted_once(select_scores(output_from(model, tokens, normed), target))
    relevance = normed.new_empty(scores_BM.shape[1], len(normed))
    for row, (gradient,) in zip(relevance, gradients_of_scores(scores_BM, (normed,)), strict=True):
        row.copy_((normed.detach() * gradient).sum(dim=1))
    return relevance, scores_BM.detach()


def score_class_token_queries(
    model: VisionTransformer, tokens: PackedTokens, target: Target, normed_TC: Float[Tensor, "T C"]
) -> Float[Tensor, "B M"]:
    """Compute the share of the class tokens' scores that goes through their queries and appears in no map.

    Arguments as in :func:`score_tokens`.
    """
    block = model.last_block
    normed = tokens.with_rows(normed_TC.detach())
    fixed = tokens.with_rows(tokens.rows_TC.detach())
    first = normed.first().requires_grad_()
    with torch.enable_grad():
        k, v = (x.detach() for x in block.attn.keys_and_values(normed))
        q = block.attn.class_token_queries(first)
        out = cast(Tensor, tokens.read(q, k, v, impl=block.attn.impl))
        scores_BM = select_scores(model.predict_from_class_token(block.finish(fixed, out)), target)
        scores_BM = tokens.counted_once(scores_BM)
    parts = [(first.detach() * g).sum(dim=(1, 2)) for (g,) in gradients_of_scores(scores_BM, (first,))]
    return tokens.of_all(torch.stack(parts, dim=1))


def gradients_of_scores(scores_BM: Float[Tensor, "B M"], leaves: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield ∂(Σ_b score_bm)/∂x for each leaf x, one target m at a time.

    Images are independent, so the sum over images does not mix their gradients. A target function that does not depend
    on the output gives zeros.
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
    """Compute ∂(Σ_b score_bm)/∂x for the class tokens' attention output x, many targets in one backward pass.

    From the attention output to the scores there are only a projection, an MLP and the head, on a few rows, so separate
    backward passes for 1,000 classes would be dominated by call overhead. Targets are batched as far as memory allows.
    A target function, which may do anything, is differentiated one target at a time.

    Args:
        scores_BM: (B, M), computed from ``read``.
        read: (B, R, H, D), the attention output, a leaf of the scores' graph.
        target: the target that the scores belong to.
    """
    count = scores_BM.shape[1]
    if callable(target) or not scores_BM.requires_grad or count < _LEAST_TOGETHER:
        return torch.stack([gradient for (gradient,) in gradients_of_scores(scores_BM, (read,))])
    one_hot = torch.eye(count, dtype=scores_BM.dtype, device=scores_BM.device)[:, None].expand(-1, len(scores_BM), -1)
    together = max(1, _NUMBERS_TOGETHER // max(1, read.numel()))
    gradients = [
        torch.autograd.grad(scores_BM, read, chunk, retain_graph=True, is_grads_batched=True, materialize_grads=True)[0]
        for chunk in one_hot.split(together)
    ]
    return torch.cat(gradients)
