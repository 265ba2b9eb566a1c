"""The path of values: attention stands still, and what it reads grows from tokens of zero to what they are.

With v the last attention's values and b_v what they are where a token is 0, the path is v_β = b_v + β(v − b_v),
0 ≤ β ≤ 1, at the attention weights of the prediction. What the class token reads is linear in the values, so that it
moves along a straight line, o_β = b_v + β(o − b_v), and the path integral of token i is

    S_i = Σ_h a_hi (v_hi − b_v) · ∫ ∂f/∂o at o_β dβ,

the value term of CDAM's closed form with the gradient averaged over the path. It is complete: all tokens sum to
f − f(b_v). CDAM's other term, through the key, is left out with reason: it compares a token with one whose score
q·k is 0, which is no absent token (its score would be −∞), so that its sign is that of the raw score, of which the
softmax knows no zero.

A step costs a tail of one token, and no attention; keys and values are passed over once, whatever the number of steps.
Where the prediction reads more than the class token, or something hangs on the last block, each step is a backward
through the block.

Dimension key: B images, R steps, T packed tokens, M maps, H heads, D head width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.attention.api import token_relevance
from maskattn.explain.last_block import output_with_values, reads_class_token_alone, values_and_origin
from maskattn.explain.norm_path import scores_of_reads
from maskattn.explain.targets import Target, select_scores
from maskattn.explain.token_scores import gradients_of_reads, gradients_of_scores
from maskattn.explain.token_subsets import batches, repeat_tokens, target_of_copies
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
    copies: int,
) -> Float[Tensor, "M T"]:
    """S of all packed tokens, prefix tokens among them.

    Args:
        model: the vision transformer.
        tokens: what ``model.before_last_block`` gave.
        target: see :func:`maskattn.explain.targets.select_scores`.
        betas_m, weights_m: nodes and weights of the integral.
        copies: nodes at a time.
    """
    way = _in_closed_form if reads_class_token_alone(model) else _by_autograd
    return way(model, tokens, target, betas_m, weights_m, copies)


@torch.no_grad()
def value_path_difference(model: VisionTransformer, tokens: PackedTokens, target: Target) -> Float[Tensor, "B M"]:
    """f − f(b_v): what the scores of all tokens sum to."""
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
    for part in batches(len(betas_m), copies):
        betas = betas_m[part, None, None]
        out_BRHD = betas * read.out_B1HD if origin is None else origin + betas * (read.out_B1HD - origin)
        leaf = out_BRHD.requires_grad_()
        with torch.enable_grad():
            scores = scores_of_reads(model, tokens, leaf, target)
        mean_MBHD = mean_MBHD + torch.einsum("mbrhd,r->mbhd", gradients_of_reads(scores, leaf, target), weights_m[part])
    assert isinstance(mean_MBHD, Tensor), "there is at least one node"
    return token_relevance(
        read.q_B1HD,
        read.k_THD,
        read.v_THD,
        read.out_B1HD,
        read.lse_B1H,
        mean_MBHD[:, :, None],
        tokens.packing.cu_seqlens,
        tokens.packing.max_seqlen,
        key_origin=read.k_THD,  # keys stand still
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
    for part in batches(len(betas_m), copies):
        betas, weights = betas_m[part, None, None], weights_m[part]
        leaf = (origin_1C + betas * (values_TC - origin_1C)).flatten(0, 1).requires_grad_()
        many = repeat_tokens(tokens, len(weights))
        with torch.enable_grad():
            output = output_with_values(model, many, leaf)
            scores = select_scores(output, target_of_copies(target, tokens.packing.batch_size))
        if relevance is None:
            relevance = values_TC.new_zeros(scores.shape[1], len(values_TC))
        for row, (gradient,) in zip(relevance, gradients_of_scores(scores, (leaf,)), strict=True):
            of_nodes = torch.einsum("rtc,r->tc", gradient.unflatten(0, (len(weights), -1)), weights)
            row.add_(((values_TC - origin_1C) * of_nodes).sum(dim=1))
    assert relevance is not None, "there is at least one node"
    return relevance
