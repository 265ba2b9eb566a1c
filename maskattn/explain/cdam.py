"""Class-discriminative attention maps (CDAM): which tokens speak for a class, and which against it.

Source: Brocki, Binda, Chung, *Class-Discriminative Attention Maps for Vision Transformers*, arXiv 2312.02364.

Dimension key: B images, M maps, H·W grid tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.explain.targets import Target, gives_one_map
from maskattn.explain.token_scores import score_tokens
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import unpack
from maskattn.shapes import Bool, Float

__all__ = ["CDAM", "as_maps"]


class CDAM:
    """Relevance maps of a vision transformer, signed and not normalised.

    Positive supports the target, negative speaks against it; background tokens are 0. Class-token models take the
    closed form, at the price of one attention row whatever the number of targets; mean-pooled ones go through
    autograd. The backbone runs once, without a graph; nothing is left behind on the model.

    Args:
        model: a :class:`maskattn.nn.VisionTransformer`, in eval mode.

    Example:
        >>> from maskattn.nn import VisionTransformer
        >>> vit = VisionTransformer(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        >>> CDAM(vit).attribute(torch.randn(1, 3, 64, 64), target=0).shape
        torch.Size([1, 4, 4])
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model

    def attribute(
        self, inputs: Float[Tensor, "B I X Y"], target: Target, keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Explain a prediction.

        Args:
            inputs: (B, in_chans, H·p, W·p) images.
            target: a class index; a (B,) tensor with one for each image; a list of indices; "all"; or a function of
                the model's output that returns (B,) or (B, M) scores.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.

        Returns:
            (B, H, W), or (B, M, H, W) for a list, "all" and functions with several scores.

        Raises:
            TypeError, ValueError: inputs, target or keep do not fit the model.
        """
        with torch.no_grad():
            tokens = self.model.before_last_block(self.model.embed(inputs, keep))
        relevance_MT, scores_BM = score_tokens(self.model, tokens, target)
        maps = as_maps(relevance_MT, tokens)
        return maps[:, 0] if gives_one_map(target, scores_BM) else maps


def as_maps(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M H W"]:
    """Values of packed tokens as maps over the grid; prefix tokens are dropped, background is 0."""
    dense_BNM = unpack(values_MT.T, tokens.packing)[:, tokens.num_prefix :]
    return dense_BNM.transpose(1, 2).unflatten(2, tokens.grid_HW)
