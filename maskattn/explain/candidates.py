"""Rules of attribution under trial: CDAM with its sum corrected, and layer-wise rules in the last block's tail.

Source: Achtibat et al., arXiv 2402.05602 (AttnLRP), for the rules of softmax, product, norm and activation.

Dimension key: B images, T packed tokens, M maps, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskattn.explain.attention_row import AttentionRow
from maskattn.explain.explainer import Explainer, Request, as_maps
from maskattn.explain.integrated import score_difference
from maskattn.explain.token_scores import score_tokens

__all__ = ["CompletedCDAM", "RelevanceRules", "layer_wise_rules"]


class CompletedCDAM(Explainer):
    """CDAM, and what its sum lacks of f(T) − f(0) shared out in proportion to |S_i|."""

    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        relevance, _ = score_tokens(request.model, request.tokens, request.target)
        maps = as_maps(relevance, request.tokens)
        lacking = score_difference(request.model, request.tokens, request.target) - maps.sum(dim=(2, 3))
        size = maps.abs()
        return maps + lacking[..., None, None] * size / size.sum(dim=(2, 3), keepdim=True).clamp(min=1e-12)


class RelevanceRules(Explainer):
    """Layer-wise relevance at the last attention's input: gradient times token, under the rules of AttnLRP.

    In the tail a norm's deviation is held fixed and an activation is its secant; of a product of weight and value each
    gets half, and of the weight's half the key gets half.
    """

    @torch.no_grad()
    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        row = AttentionRow.of(request.model, request.tokens, request.target)
        with layer_wise_rules():
            gradients = row.gradients(row.read.out_B1HD)[:, :, 0]
        values = row.weighted_values(gradients)
        if row.read.value_origin is not None:
            values = values - row.weighted((gradients * row.read.value_origin).sum(dim=-1))
        keys = row.relevance(gradients) - values
        return as_maps(0.5 * values + 0.25 * keys, request.tokens)


class layer_wise_rules(TorchFunctionMode):  # noqa: N801 (a context, as torch.no_grad is)
    """Within it norms and activations are linear at the point where they are computed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Norms with their deviation held, activations as their secants, all else as it is."""
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return _norm_with_fixed_deviation(*args, **kwargs)
        if func in (F.gelu, F.silu, F.relu):
            x = args[0]
            return x * (func(*args, **kwargs) / torch.where(x == 0, 1, x)).detach()
        if func in (torch.sigmoid, Tensor.sigmoid):
            return func(*args, **kwargs).detach()
        return func(*args, **kwargs)


def _norm_with_fixed_deviation(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt().detach()
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias
