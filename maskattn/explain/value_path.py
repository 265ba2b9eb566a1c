"""The path of values: attention weights are held fixed, and the values grow from those of zero tokens to their own.

Let v be the last attention's values and b_v the value of a token of 0. The path is v_β = b_v + β(v − b_v), 0 ≤ β ≤ 1,
at the attention weights of the prediction. The class token's attention output is linear in the values, so it moves
along a straight line, o_β = b_v + β(o − b_v), and the path integral of token i is

    S_i = Σ_h a_hi (v_hi − b_v) · ∫ ∂f/∂o at o_β dβ,

the value term of CDAM's closed form with the gradient averaged over the path. It is complete: all tokens sum to
f − f(b_v). CDAM's key term is omitted on purpose: it compares a token with one whose score q·k is 0, which is not an
absent token (whose score would be −∞). Its sign is that of the raw score, although the softmax has no natural zero.

A step costs a tail of one token and no attention; keys and values are read once, whatever the number of steps. If the
prediction reads more than the class token, or the last block has hooks or adapters, each step is a backward pass
through the block.

Dimension key: B images, R steps, T packed tokens, M maps, H heads, D head width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.last_block import output_with_values, reads_class_token_alone, values_and_origin
from maskattn.explain.norm_path import scores_of_reads
from maskattn.explain.targets import Target, select_scores
from maskattn.explain.token_scores import gradients_of_reads, gradients_of_scores
from maskattn.explain.token_subsets import batches, copies_at_once, repeat_tokens, target_of_copies
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["score_tokens_on_value_path", "value_path_difference"]


def score_tokens_on_value_path(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    betas_m: Float[Tensor, "m"],
    weights_m: Float[Tensor, "m"],
    internal_batch_size: int | None = None,
) -> Float[Tensor, "M T"]:
    """Compute S (M, T) of all packed tokens, prefix tokens included.

    Args:
        model: the vision transformer.
        tokens: the output of ``model.before_last_block``.
        target: see :func:`maskattn.explain.targets.select_scores`.
        betas_m, weights_m: (m,) each, nodes and weights of the quadrature.
        internal_batch_size: see :class:`~maskattn.explain.integrated.IntegratedCDAM`.
    """
    closed = reads_class_token_alone(model)
    copies = copies_at_once(tokens, internal_batch_size, class_tokens=closed)
    return (_in_closed_form if closed else _by_autograd)(model, tokens, target, betas_m, weights_m, copies)


@torch.no_grad()
def value_path_difference(model: VisionTransformer, tokens: PackedTokens, target: Target) -> Float[Tensor, "B M"]:
    """Compute f − f(b_v), (B, M), the sum of the scores of all tokens."""
    if reads_class_token_alone(model):
        read = model.last_block.read_attention(tokens)
        start = (
            torch.zeros_like(read.out_B1HD) if read.value_origin is None else read.value_origin.expand_as(read.out_B1HD)
        )
        return scores_of_reads(model, tokens, read.out_B1HD, target) - scores_of_reads(model, tokens, start, target)
    values_TC, origin_1C = values_and_origin(model, tokens)
    end, start = (output_with_values(model, tokens, x) for x in (values_TC, origin_1C.expand_as(values_TC)))
    return select_scores(end, target) - select_scores(start, target)


@torch.no_grad()
def _in_closed_form(
    model: VisionTransformer, tokens: PackedTokens, target: Target, betas_m: Tensor, weights_m: Tensor, copies: int
) -> Tensor:
    read = model.last_block.read_attention(tokens)
    origin = read.value_origin
    mean_MBHD: Tensor | float = 0.0
    for chunk in batches(len(betas_m), copies):
        betas = betas_m[chunk, None, None]
        out_BRHD = betas * read.out_B1HD if origin is None else origin + betas * (read.out_B1HD - origin)
        leaf = out_BRHD.requires_grad_()
        with torch.enable_grad():
            scores = scores_of_reads(model, tokens, leaf, target)
        gradients = gradients_of_reads(scores, leaf, target)
        mean_MBHD = mean_MBHD + torch.einsum("mbrhd,r->mbhd", gradients, weights_m[chunk])
    assert isinstance(mean_MBHD, Tensor), "there is at least one node"
    return tokens.relevance(
        read.q_B1HD,
        read.k_THD,
        read.v_THD,
        read.out_B1HD,
        read.lse_B1H,
        mean_MBHD[:, :, None],
        key_origin=read.k_THD,  # keys do not move along the path
        value_origin=origin,
        impl=model.last_block.attn.impl,
    )


def _by_autograd(
    model: VisionTransformer, tokens: PackedTokens, target: Target, betas_m: Tensor, weights_m: Tensor, copies: int
) -> Tensor:
    tokens = tokens.with_rows(tokens.rows_TC.detach())
    with torch.no_grad():
        values_TC, origin_1C = values_and_origin(model, tokens)
    relevance: Tensor | None = None
    for chunk in batches(len(betas_m), copies):
        betas, weights = betas_m[chunk, None, None], weights_m[chunk]
        leaf = (origin_1C + betas * (values_TC - origin_1C)).flatten(0, 1).requires_grad_()
        many = repeat_tokens(tokens, len(weights))
        with torch.enable_grad():
            output = output_with_values(model, many, leaf)
            scores = tokens.counted_once(select_scores(output, target_of_copies(target, tokens.packing.batch_size)))
        if relevance is None:
            relevance = values_TC.new_zeros(scores.shape[1], len(values_TC))
        for row, (gradient,) in zip(relevance, gradients_of_scores(scores, (leaf,)), strict=True):
            of_nodes = torch.einsum("rtc,r->tc", gradient.unflatten(0, (len(weights), -1)), weights)
            row.add_(((values_TC - origin_1C) * of_nodes).sum(dim=1))
    assert relevance is not None, "there is at least one node"
    return relevance
