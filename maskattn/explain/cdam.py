"""Class-discriminative attention maps (CDAM): signed relevance of each token for a class.

Source: Brocki, Binda, Chung, *Class-Discriminative Attention Maps for Vision Transformers*, arXiv 2312.02364.

Dimension key: B images, M maps, T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.explainer import TokenExplainer
from maskattn.explain.targets import Target
from maskattn.explain.token_scores import score_tokens
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer

__all__ = ["CDAM"]


class CDAM(TokenExplainer):
    """Relevance maps of a vision transformer, signed and not normalised: S_i = Σ_j T_ij · ∂f/∂T_ij.

    T is the input of the last block's attention. Positive values support the target, negative values oppose it;
    background tokens are 0. Class-token models use a closed form that costs one attention row, whatever the number of
    targets. Mean-pooled models, and those with a hook or an adapter on their last block, go through autograd. The
    backbone runs once, without a graph, and the model is left unchanged.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.

    Example:
        >>> from maskattn.nn import VisionTransformer
        >>> vit = VisionTransformer(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        >>> CDAM(vit).attribute(torch.randn(1, 3, 64, 64), target=0).shape
        torch.Size([1, 4, 4])
    """

    def relevance(  # noqa: D102 (as of TokenExplainer)
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, generator: torch.Generator | None = None
    ) -> Tensor:
        return score_tokens(model, tokens, target)[0]
