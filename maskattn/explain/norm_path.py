"""The path α·T, 0 ≤ α ≤ 1, in one pass over keys and values, for models whose prediction reads only the class token.

T is the input of the last block's attention. Along the path keys and values are affine in α: k_α = α(k − b_k) + b_k,
and the same for v_α. In the class token's scores q_α·k_α = (α q_α)·k + (1 − α) q_α·b_k the last term is the same for
every token and drops out of the softmax, so that the attention row at α is a readout of the *unscaled* keys by the
query α q_α. The output is o_α = α(o − b_v) + b_v, where o is the readout of the unscaled values. With g_c the gradient
of score c at o_α, the integrand of token i is

    a_i · [ (v_i − b_v)·g_c + ((v_i − o)·g_c) · ((k_i − b_k)·α q_α) ]   (for one head; scores scaled by 1/√D),

the closed form of CDAM for the query α q_α. All steps are readout queries of one call, and keys and values are neither
copied nor recomputed: m steps cost m tails of one token and O(T·D·m·K) operations.

The path of weights (:mod:`maskattn.explain.weights_path`) is this path with other origins of the keys. These depend on
the step, so each step takes a pass over keys and values.

Keys must be affine in their token with the same constant for all tokens: no k norm, and no rotation of a bias.

Dimension key: B images, R steps, T packed tokens, M maps, H heads, D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maskattn.explain.targets import Target, select_scores
from maskattn.explain.token_scores import gradients_of_scores
from maskattn.explain.token_subsets import batches, target_of_copies
from maskattn.explain.weights_path import along, origin_of_weights
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["MOST_QUERIES", "keys_are_proportional", "score_tokens_on_norm_path", "scores_of_reads"]

MOST_QUERIES = 16
"""Readout queries in one call."""


def keys_are_proportional(model: VisionTransformer, tokens: PackedTokens) -> bool:
    """Return whether the last block's keys, minus a common constant, are linear in their token."""
    attn = model.last_block.attn
    if not isinstance(attn.k_norm, nn.Identity):
        return False
    bias = attn.qkv.bias
    return tokens.rotation is None or bias is None or not bool(bias.chunk(3)[1].any())


def score_tokens_on_norm_path(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    alphas_m: Float[Tensor, "m"],
    weights_m: Float[Tensor, "m"],
    copies: int,
    with_queries: bool,
    in_weights: bool = False,
) -> tuple[Float[Tensor, "M T"], Float[Tensor, "B M"]]:
    """Compute the integral with these nodes and weights. Arguments and results as in ``score_tokens_integrated``."""
    attn, packing = model.last_block.attn, tokens.packing
    with torch.no_grad():
        normed = tokens.with_rows(model.last_block.norm1(tokens.rows_TC))
        k, v = attn.keys_and_values(normed)
        origins = attn.key_and_value_origins(normed)
    value_origin = origins[1]
    relevance: Tensor | None = None
    queries: Tensor | float = 0.0
    for chunk in batches(len(alphas_m), min(copies, MOST_QUERIES)):
        alphas, weights = alphas_m[chunk], weights_m[chunk]
        first_BRC = (alphas[:, None] * normed.first()).requires_grad_(with_queries)
        with torch.set_grad_enabled(with_queries):
            q_BRHD = alphas[:, None, None] * attn.class_token_queries(first_BRC)
            out, lse = tokens.read(q_BRHD, k, v, return_lse=True, impl=attn.impl)
            step = alphas[:, None, None]
            read = step * out if value_origin is None else value_origin + step * (out - value_origin)
        read = read if with_queries else read.requires_grad_()
        with torch.enable_grad():
            scores = scores_of_reads(model, tokens, read, target)
        leaves = (read, first_BRC) if with_queries else (read,)
        gradients = list(gradients_of_scores(scores, leaves))
        grad_out = torch.stack([weights[:, None, None] * of_read for of_read, *_ in gradients])
        origins_of_keys = _origins_of_weights(model, normed, alphas, q_BRHD, k) if in_weights else [origins[0]]
        size = 1 if in_weights else len(alphas)
        for steps, key_origin in zip(batches(len(alphas), size), origins_of_keys, strict=True):
            of_steps = tokens.relevance(
                q_BRHD[:, steps],
                k,
                v,
                out[:, steps],
                lse[:, steps],
                grad_out[:, :, steps],
                key_origin=key_origin,
                value_origin=value_origin,
                impl=attn.impl,
            )
            relevance = of_steps if relevance is None else relevance + of_steps
        if with_queries:
            along = (weights[:, None] * normed.first()).detach()
            of_queries = torch.stack([(along * of_first).sum(dim=(1, 2)) for _, of_first in gradients], dim=1)
            queries = queries + tokens.mean_of_all(of_queries)
    assert relevance is not None, "there is at least one node"
    return relevance, queries + relevance.new_zeros(packing.batch_size, len(relevance))


def _origins_of_weights(
    model: VisionTransformer, normed: PackedTokens, alphas_m: Tensor, q_BRHD: Tensor, k_THD: Tensor
) -> Iterator[Tensor]:
    """Yield the keys' origins for each step of the path of weights."""
    attn = model.last_block.attn
    first_BRC = (alphas_m[:, None] * normed.first()).detach().requires_grad_()
    with torch.enable_grad():
        grown_BRHD = alphas_m[:, None, None] * along(attn.class_token_queries(first_BRC), first_BRC)
    q_BRHD = q_BRHD.detach()
    for r in range(len(alphas_m)):
        q_B1HD = q_BRHD[:, r : r + 1]
        _, rows_1HT = normed.read(q_B1HD, k_THD, k_THD, return_rows=True, impl=attn.impl)
        yield origin_of_weights(q_BRHD[:, r], grown_BRHD[:, r], k_THD, k_THD, rows_1HT[0], normed)


def scores_of_reads(
    model: VisionTransformer, tokens: PackedTokens, out_BRHD: Float[Tensor, "B R H D"], target: Target
) -> Float[Tensor, "R_B M"]:
    """Compute the scores of R variants of each class token's attention output, (R·B, M), one variant after the other.

    Args:
        model: a model whose prediction reads only the class token.
        tokens: the last block's input.
        out_BRHD: (B, R, H, D), the variants of the attention output.
        target: see :func:`maskattn.explain.targets.select_scores`.
    """
    token_BRC = model.last_block.finish(tokens.with_rows(tokens.rows_TC.detach()), out_BRHD)
    output = model.predict_from_class_token(token_BRC.transpose(0, 1).flatten(0, 1)[:, None])
    return select_scores(output, target_of_copies(target, len(token_BRC)))
