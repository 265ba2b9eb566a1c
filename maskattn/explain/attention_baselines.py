"""Baselines that read attention matrices: the last row, rollout and relevance propagation.

The last two need the N×N weights of every block and compute them densely, so memory grows as blocks × heads × N².

Sources: Abnar and Zuidema, arXiv 2005.00928 (rollout); Chefer et al., arXiv 2103.15679 (relevance propagation).

Dimension key: B images, M maps, L = P + N tokens of a sequence (P prefix tokens, N = H·W grid tokens), T packed tokens,
H heads, D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from maskattn.explain.attention_maps import attend_from_class_token, check_class_token
from maskattn.explain.explainer import Explainer, Request, as_maps
from maskattn.explain.targets import select_scores
from maskattn.explain.token_scores import gradients_of_scores
from maskattn.nn.blocks import Attention, Block, PackedTokens
from maskattn.nn.plain_modules import forwards_of, is_plain
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import pack, unpack
from maskattn.shapes import Float

__all__ = ["AttentionRollout", "AttentionRow", "RelevancePropagation"]


class AttentionRow(Explainer):
    """:class:`maskattn.explain.AttentionMap` with the common interface. The map is the same for every target."""

    multiplies_by_inputs = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        check_class_token(self.model)

    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        row_T = attend_from_class_token(request.model, request.tokens).mean(dim=0)
        return _for_every_score(as_maps(row_T[None], request.tokens)[:, 0], request)


class AttentionRollout(Explainer):
    """Attention rollout: the product over blocks of ½·(head mean + identity), read at the tokens that the model pools.

    The map is the same for every target. Source: Abnar and Zuidema, arXiv 2005.00928.
    """

    multiplies_by_inputs = False

    @torch.no_grad()
    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        tokens, weights = _with_weights(request.model, request.embedded)
        paths = _identity(weights[0])
        for weights_BHLL in weights:
            paths = (weights_BHLL.mean(dim=1) + _identity(weights_BHLL)) / 2 @ paths
        return _for_every_score(_read(request.model, tokens, paths), request)


class RelevancePropagation(Explainer):
    """Relevance propagation, read at the tokens that the model pools.

    R starts as the identity; each block updates R ← R + Ā·R, with Ā the mean over heads of max(∇A ⊙ A, 0).
    Source: Chefer et al., arXiv 2103.15679.
    """

    multiplies_by_inputs = False

    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        model, tokens = request.model, request.embedded
        with torch.enable_grad():
            rows_TC = tokens.rows_TC.detach().requires_grad_()
            last, weights = _with_weights(model, tokens.with_rows(rows_TC))
            scores_BM = select_scores(model.pool(last), request.target)
        maps = []
        for gradients in gradients_of_scores(scores_BM, weights):
            relevance = _identity(weights[0])
            for weights_BHLL, gradient in zip(weights, gradients, strict=True):
                relevance = relevance + (weights_BHLL.detach() * gradient).clamp(min=0).mean(dim=1) @ relevance
            maps.append(_read(model, last, relevance))
        return torch.stack(maps, dim=1)


def _for_every_score(maps_BHW: Tensor, request: Request) -> Float[Tensor, "B M H W"]:
    return maps_BHW[:, None].expand(-1, request.scores_BM.shape[1], -1, -1)


def _with_weights(
    model: VisionTransformer, tokens: PackedTokens
) -> tuple[PackedTokens, list[Float[Tensor, "B H L L"]]]:
    """Run all blocks and return the attention weights of each; rows and columns of dropped tokens hold 0."""
    if model.position_kind == "alibi":
        raise ValueError(
            "rollout and relevance propagation do not support ALiBi, got a model with pos_embed='alibi'; use CDAM, or "
            "AttentionMap for the class token's row"
        )
    weights = []
    for block in cast(Sequence[Block], model.blocks):
        _check_is_called_by_parts(block)
        normed = tokens.with_rows(block.norm1(tokens.rows_TC))
        out_THD, weights_BHLL = _attend(block, normed)
        attended = tokens.rows_TC + block.ls1(block.attn.project(out_THD))
        tokens = tokens.with_rows(block.feed_forward(attended, tokens))
        weights.append(weights_BHLL)
    return tokens, weights


_CALLED_BY_PARTS = forwards_of((Block, Attention))


def _check_is_called_by_parts(block: Block) -> None:
    """Refuse a block or an attention with hooks of its own: both are written out here, so their hooks would not run."""
    if not (all(is_plain(module, _CALLED_BY_PARTS, itself=True) for module in (block, block.attn))):
        raise ValueError(
            "rollout and relevance propagation need every block's weights, and a block or its attention has been "
            f"replaced, patched or hooked, got {type(block).__name__} with {type(block.attn).__name__}; remove the "
            "hooks, or use CDAM"
        )


def _attend(block: Block, normed: PackedTokens) -> tuple[Float[Tensor, "T H D"], Float[Tensor, "B H L L"]]:
    attn, packing = block.attn, normed.packing
    q, k, v = attn.queries_keys_and_values(normed.rows_TC, normed)
    q, k, v = (unpack(x, packing).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    present_BL = cast(Tensor, packing.row_of_token).view(packing.batch_size, -1) >= 0
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~present_BL[:, None, None, :], -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~present_BL[:, None, :, None], 0)
    return pack((weights @ v).transpose(1, 2), packing), weights


def _identity(weights_BHLL: Tensor) -> Float[Tensor, "B L L"]:
    B, _, L, _ = weights_BHLL.shape
    return torch.eye(L, dtype=weights_BHLL.dtype, device=weights_BHLL.device).expand(B, L, L)


def _read(model: VisionTransformer, tokens: PackedTokens, matrix_BLL: Tensor) -> Float[Tensor, "B H W"]:
    """Return the class token's row if the model pools it, else the mean over the kept grid tokens' rows."""
    P = tokens.num_prefix
    if model.global_pool == "token":
        return matrix_BLL[:, 0, P:].unflatten(1, tokens.grid_HW)
    present_BN = cast(Tensor, tokens.packing.row_of_token).view(len(matrix_BLL), -1)[:, P:] >= 0
    share_BN = present_BN / present_BN.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bl,bln->bn", share_BN.to(matrix_BLL), matrix_BLL[:, P:, P:]).unflatten(1, tokens.grid_HW)
