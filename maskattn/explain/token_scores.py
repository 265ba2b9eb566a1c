"""The score of every token for every target: S_i = Σ_j T_ij · ∂f/∂T_ij, T the input of the last block's attention.

Two ways to the same number:

- closed form, for models that read the class token alone. With q its query (scaled), k and v the keys and values,
  a its attention row, o its output per head and g = ∂f/∂o, a backward through one token's projection, MLP and head:

      S_i = Σ_h a_hi · [ (v_hi − b_v)·g_h + ((v_hi − o_h)·g_h) · ((k_hi − b_k)·q_h) ]

  (k − b_k and v − b_v are the derivatives of k and v along T, since both are affine in T.) All targets in one pass
  over k and v; no graph behind it.
- autograd through the last block, for mean-pooled models, whose prediction reads every token.

Source: Brocki, Binda, Chung, arXiv 2312.02364, for S; the closed form is this package's.

Dimension key: B images, T packed tokens, M targets, H heads, D head width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.targets import Target, select_scores
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["score_tokens", "score_tokens_by_autograd", "score_tokens_in_closed_form"]


def score_tokens(
    model: VisionTransformer, tokens: PackedTokens, target: Target
) -> tuple[Float[Tensor, "M T"], Float[Tensor, "B M"]]:
    """Relevance of each packed token for each target, by whichever way covers the model.

    Args:
        model: the vision transformer.
        tokens: what ``model.before_last_block`` gave.
        target: see :func:`maskattn.explain.targets.select_scores`.

    Returns:
        S (M, T), prefix tokens among the T, and the scores (B, M) that were explained.
    """
    way = score_tokens_in_closed_form if model.global_pool == "token" else score_tokens_by_autograd
    return way(model, tokens, target)


def score_tokens_in_closed_form(
    model: VisionTransformer, tokens: PackedTokens, target: Target
) -> tuple[Tensor, Tensor]:
    """The closed form above. Arguments and results as in :func:`score_tokens`."""
    block = model.last_block
    with torch.no_grad():
        read = block.read_rows(tokens)
    q, k, v = read.q_B1HD, read.k_THD, read.v_THD
    out = read.out_B1HD.detach().requires_grad_()
    with torch.enable_grad():
        scores_BM = select_scores(model.predict_from_class_token(block.finish(tokens.first().detach(), out)), target)
    gradients = [g[:, 0] for g in _gradients(scores_BM, out)]  # M of [B, H, D]

    with torch.no_grad():
        zero = k.new_zeros(k.shape[1:])
        bias_k, bias_v = block.attn.key_and_value_biases() or (zero, zero)
        sequence = tokens.packing.sequence_of_token
        scale = k.shape[-1] ** -0.5
        score_change_TH = scale * ((k - bias_k) * q[:, 0][sequence]).sum(dim=-1)
        relevance = []
        for g in gradients:
            from_value = ((v - bias_v) * g[sequence]).sum(dim=-1)  # [T, H]
            offset = (g * (bias_v - out[:, 0])).sum(dim=-1)[sequence]
            from_score = (from_value + offset) * score_change_TH
            relevance.append((read.weights_HT.T * (from_value + from_score)).sum(dim=1))
    return torch.stack(relevance), scores_BM.detach()


def score_tokens_by_autograd(model: VisionTransformer, tokens: PackedTokens, target: Target) -> tuple[Tensor, Tensor]:
    """A backward through the last block for each target. Arguments and results as in :func:`score_tokens`."""
    tokens = tokens.with_rows(tokens.rows_TC.detach())
    with torch.enable_grad():
        normed = model.last_block.norm1(tokens.rows_TC).detach().requires_grad_()
        scores_BM = select_scores(model.pool(model.last_block.mix(tokens, normed)), target)
    relevance = [(normed.detach() * g).sum(dim=1) for g in _gradients(scores_BM, normed)]
    return torch.stack(relevance), scores_BM.detach()


def _gradients(scores_BM: Tensor, x: Tensor) -> list[Tensor]:
    """∂(Σ_b score_bm)/∂x for each target m; images do not mix, so the sum keeps them apart."""
    count = scores_BM.shape[1]
    if not scores_BM.requires_grad:
        return [torch.zeros_like(x)] * count  # a target function that does not depend on the output
    return [
        torch.autograd.grad(scores_BM[:, m].sum(), x, retain_graph=m + 1 < count, materialize_grads=True)[0]
        for m in range(count)
    ]
