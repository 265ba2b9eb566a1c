"""The attention map: the class token's row of the last block's attention.

Source: as drawn by DINO (Caron et al., arXiv 2104.14294), restricted to the kept tokens (arXiv 2404.18152).

Dimension key: B images, T packed tokens, H·W grid tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskattn.explain.explainer import as_maps
from maskattn.explain.packed_model import check_explainable, packed_model
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float

__all__ = ["AttentionMap", "attend_from_class_token", "check_class_token"]


class AttentionMap:
    """The class token's attention in the last block, as a map over the grid.

    Background tokens are exactly 0. A map sums to 1 minus the attention to the class token itself and the registers.

    Args:
        model: a model with a class token; see :func:`maskattn.explain.packed_model.packed_model`.

    Raises:
        TypeError, ValueError: the model is of an unsupported kind, or has no class token.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = packed_model(model)
        check_class_token(self.model)

    @torch.no_grad()
    def attribute(
        self,
        inputs: Float[Tensor, "B I X Y"],
        keep: Bool[Tensor, "..."] | None = None,
        heads: Sequence[int] | str | None = None,
    ) -> Float[Tensor, "..."]:
        """The attention row as a map.

        Args:
            inputs: (B, in_chans, H·p, W·p) images.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.
            heads: None for the mean over heads, "all", or a list of head indices.

        Returns:
            (B, H, W), or (B, heads, H, W) if ``heads`` is given.

        Raises:
            TypeError, ValueError: inputs, keep or heads do not fit the model, or dropout is active (train mode).
        """
        check_explainable(self.model)
        count = self.model.last_block.attn.num_heads
        if (isinstance(heads, str) and heads != "all") or any(not 0 <= h < count for h in _indices(heads)):
            raise ValueError(f"heads must be None, 'all' or indices in 0 … {count - 1}, got heads={heads!r}")
        tokens = self.model.before_last_block(self.model.embed(inputs, keep))
        maps = as_maps(attend_from_class_token(self.model, tokens), tokens)
        if heads is None:
            return maps.mean(dim=1)
        return maps if heads == "all" else maps[:, _indices(heads)]


def check_class_token(model: VisionTransformer) -> None:
    """Refuse a model without a class token, which has no attention map.

    Raises:
        ValueError: the model has no class token.
    """
    if model.cls_token is None:
        raise ValueError(
            "an attention map is the class token's row, and this model has none (class_token=False); use CDAM"
        )


@torch.no_grad()
def attend_from_class_token(model: VisionTransformer, tokens: PackedTokens) -> Float[Tensor, "H T"]:
    """The class token's attention in the last block, per head and packed token.

    Args:
        model: a model with a class token.
        tokens: the output of ``model.before_last_block``.
    """
    return model.last_block.read_weights(tokens)


def _indices(heads: Sequence[int] | str | None) -> list[int]:
    return [] if heads is None or isinstance(heads, str) else list(heads)
