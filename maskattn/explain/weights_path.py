"""The path of weights: the norm path, attributing changes of attention weights instead of attention scores.

Along the path α·T of :mod:`maskattn.explain.norm_path` a query's attention output is o = Σ_i a_i v_i, with a its
softmax weights and v the values. With g = ∂f/∂o the score changes by

    df/dα = g·do/dα = Σ_i [ a_i v̇_i·g + ȧ_i v_i·g ].

Weights sum to 1, so Σ_i ȧ_i = 0, and any vector common to all tokens may be subtracted from v_i in the second term.
With the output o subtracted, the term is the effect of moving weight to token i. That is the map:

    S_i = ∫ Σ_j [ a_ji v̇_i·g_j + ȧ_ji (v_i − o_j)·g_j ] dα,    ȧ_ji = a_ji (ṡ_ji − Σ_l a_jl ṡ_jl),

summed over heads, with j the queries that are read, s_ji = k_i·q_j/√D the scores and ṡ = (k̇_i·q_j + k_i·q̇_j)/√D. It is
complete, Σ_i S_i = f(T) − f(0), without a separate share of the queries: their effect on the weights is in ȧ.

Integrated Gradients in T (the path "norm") has the same first term, but a_i (v_i − o)·g · k̇_i·q/√D as the second: it
attributes the growth of the token's score from 0, not of its weight. The softmax has no natural zero. A constant added
to all scores changes neither the model, nor f along the path, nor S here, but it changes that map by multiples of
a_i (v_i − o)·g, which sum to 0. The value term alone is not complete; the term in ȧ completes it.

In the closed form of a model that reads only the class token, ``token_relevance`` takes, for each step, key origins
such that (k − origin)·q/√D = ṡ − Σ a ṡ. If every token is read, the sums over queries are gradients of the attention
with respect to additional channels of the keys, which are all 0 and whose queries hold q̇ and the mean of ṡ, so no
T × T array is formed.

Dimension key: B images, T packed tokens, H heads, D head width, C channels, M maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.last_block import output_from
from maskattn.explain.targets import Target, select_scores
from maskattn.nn.blocks import Attention, PackedTokens
from maskattn.nn.positions import alibi_slopes, rotate
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["along", "origin_of_weights", "relevance_of_parts"]

_MEAN = 8  # channels for the mean of ṡ: implementations need head widths that are multiples of 8


def along(x: Tensor, leaf: Tensor, retain_graph: bool = True) -> Tensor:
    """Compute the derivative of ``x``, a function of ``leaf``, as ``leaf`` is scaled, by two backward passes.

    uᵀ(∂x/∂leaf)·leaf is linear in u, and its derivative with respect to u is (∂x/∂leaf)·leaf.
    """
    # u multiplies x and is not passed as its gradient, for which torch imports its compiler's symbolic shapes.
    with torch.enable_grad():
        u = torch.zeros_like(x).requires_grad_()
        (back,) = torch.autograd.grad((x * u).sum(), leaf, create_graph=True, retain_graph=retain_graph)
        (derivative,) = torch.autograd.grad((back * leaf.detach()).sum(), u)
    return derivative


@torch.no_grad()
def origin_of_weights(
    q_BHD: Float[Tensor, "B H D"],
    q_along_BHD: Float[Tensor, "B H D"],
    k_THD: Float[Tensor, "T H D"],
    k_along_THD: Float[Tensor, "T H D"],
    weights_HT: Float[Tensor, "H T"],
    tokens: PackedTokens,
) -> Float[Tensor, "T H D"]:
    """Compute the key origins (T, H, D) with which ``token_relevance`` returns S of one step, for class-token queries.

    Args:
        q_BHD, q_along_BHD: the class tokens' queries and their derivative along the path.
        k_THD, k_along_THD: keys and their derivative; either may include a vector common to all tokens of an image.
        weights_HT: (H, T), the softmax weights.
        tokens: the tokens, whose features are not read.
    """
    sequence = tokens.packing.sequence_of_token
    q, q_along = (x.index_select(0, sequence) if tokens.packing.batch_size > 1 else x for x in (q_BHD, q_along_BHD))
    moved_TH = (k_along_THD * q + k_THD * q_along).sum(dim=-1)
    sums_BH = moved_TH.new_zeros(q_BHD.shape[:2]).index_add_(0, sequence, weights_HT.T.to(moved_TH) * moved_TH)
    mean_BH = tokens.of_all(sums_BH)
    moved_TH = moved_TH - mean_BH.index_select(0, sequence)
    length = q.square().sum(dim=-1, keepdim=True)
    # If a query and its derivative are zero, no weight moves.
    return k_THD - moved_TH[..., None] * q / length.where(length > 0, 1)


def relevance_of_parts(
    model: VisionTransformer, tokens: PackedTokens, target: Target, normed_TC: Float[Tensor, "T C"]
) -> tuple[Float[Tensor, "M T"], Float[Tensor, "B M"]]:
    """Compute S of one step by autograd, for models that read every token or whose last block has been changed.

    Args:
        model: the vision transformer.
        tokens: the output of ``model.before_last_block``.
        target: see :func:`maskattn.explain.targets.select_scores`.
        normed_TC: (T, C), α·T.

    Returns:
        α·S (M, T), prefix tokens included, and the scores (B, M).

    Raises:
        ValueError: the last block's attention is not this package's.
    """
    tokens = tokens.with_rows(tokens.rows_TC.detach())
    normed = normed_TC.detach().requires_grad_()
    with torch.enable_grad(), _AttentionOfLastBlock(model, tokens) as seen:
        scores_BM = tokens.counted_once(select_scores(output_from(model, tokens, normed), target))
    gradients = _gradients_at(scores_BM, seen.out_TC)
    relevance_of = seen.relevance(normed)
    return torch.stack([relevance_of(gradient) for gradient in gradients]), scores_BM.detach()


def _gradients_at(scores_BM: Tensor, out_TC: Tensor) -> Iterator[Tensor]:
    if not scores_BM.requires_grad:  # a target that does not depend on the output
        return (torch.zeros_like(out_TC) for _ in range(scores_BM.shape[1]))
    totals = scores_BM.sum(dim=0)
    return (
        torch.autograd.grad(total, out_TC, retain_graph=True, materialize_grads=True)[0] for total in totals.unbind()
    )


class _AttentionOfLastBlock:
    """A context that records queries, keys, values and the attention output of a call of the last block.

    The records include the effect of adapters and hooks on its projections.
    """

    def __init__(self, model: VisionTransformer, tokens: PackedTokens) -> None:
        attn = getattr(model.last_block, "attn", None)
        if not isinstance(attn, Attention):
            raise ValueError(
                "the path of weights needs this package's own attention in the last block, and it has been replaced, "
                f"got {type(attn).__name__}; use IntegratedCDAM(path='norm')"
            )
        self.attn, self.tokens = attn, tokens
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _AttentionOfLastBlock:
        for name in ("qkv", "q_norm", "k_norm", "norm"):
            module = cast(nn.Module, getattr(self.attn, name))

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                self._seen[name] = inputs[0] if name == "norm" else output

            self._handles.append(module.register_forward_hook(keep))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def out_TC(self) -> Float[Tensor, "T C"]:  # noqa: N802 (a dimension key)
        """The attention output of every token, all heads, in the graph of the block's call."""
        return self._seen["norm"]

    def relevance(self, normed_TC: Tensor) -> Callable[[Tensor], Float[Tensor, "T"]]:
        """Return a function from the gradient at :attr:`out_TC` to the summand of one step; the path scales T."""
        attn = self.attn
        (q, dq), (k, dk), (v, dv) = ((x.detach(), along(x, normed_TC)) for x in self._operands())
        D = q.shape[-1]
        options: dict[str, Any] = {
            "coords": self.tokens.coords_T2,
            "slopes": None if self.tokens.coords_T2 is None else alibi_slopes(attn.num_heads, self.tokens.coords_T2),
            "scale": D**-0.5,
            "impl": attn.impl,
        }

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.tokens.attend(q, k, v, **options)

        mean_TH1 = (q * attend(q, k, dk) + dq * attend(q, k, k)).sum(-1, keepdim=True)
        width = 2 * D + _MEAN
        wide_q = F.pad(torch.cat([q, dq, mean_TH1], -1), (0, _MEAN - 1))
        wide_k = F.pad(k, (0, width - D)).requires_grad_()
        wide_v = F.pad(v, (0, width - D)).requires_grad_()
        with torch.enable_grad():
            out = attend(wide_q, wide_k, wide_v)

        def relevance_of(gradient_TC: Tensor) -> Tensor:
            wide = F.pad(gradient_TC.detach().view_as(v), (0, width - D))
            of_k, of_v = torch.autograd.grad(out, (wide_k, wide_v), wide, retain_graph=True)
            grown = dk * of_k[..., :D] + k * of_k[..., D : 2 * D] + dv * of_v[..., :D]
            return grown.sum(dim=(1, 2)) - of_k[..., 2 * D].sum(dim=1)

        return relevance_of

    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, (T, H, D) each, in the graph of the block's call."""
        q, k = self._seen["q_norm"], self._seen["k_norm"]
        v = self._seen["qkv"].unflatten(-1, (3, self.attn.num_heads, -1))[:, 2]
        if self.tokens.rotation is not None:
            with torch.enable_grad():
                q, k = rotate(q, self.tokens.rotation), rotate(k, self.tokens.rotation)
        return q, k, v
