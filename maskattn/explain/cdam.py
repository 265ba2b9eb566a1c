"""Class-discriminative attention maps (CDAM): which tokens speak for a class, and which against it.

Source: Brocki, Binda, Chung, *Class-Discriminative Attention Maps for Vision Transformers*, arXiv 2312.02364.

Dimension key: B images, M maps, H·W grid tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskattn.explain.captum_calls import CaptumCalls, as_captum_calls
from maskattn.explain.concepts import Concept
from maskattn.explain.packed_model import check_explainable, packed_model, without_head
from maskattn.explain.targets import Target, gives_one_map
from maskattn.explain.token_scores import score_tokens
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import unpack
from maskattn.shapes import Bool, Float

__all__ = ["CDAM", "as_maps", "model_and_tokens", "squeeze_maps"]


class CDAM(CaptumCalls):
    """Relevance maps of a vision transformer, signed and not normalised.

    Positive supports the target, negative speaks against it; background tokens are 0. Class-token models take the
    closed form, at the price of one attention row whatever the number of targets; mean-pooled ones, and those with a
    hook or an adapter on their last block, go through autograd. The backbone runs once, without a graph; nothing is
    left behind on the model.

    Args:
        model: a :class:`maskattn.nn.VisionTransformer` in eval mode, or a vision transformer of timm or transformers,
            which is converted: see :func:`maskattn.explain.packed_model.packed_model`.

    Raises:
        TypeError, ValueError: the model is none of these, or cannot be converted.

    Example:
        >>> from maskattn.nn import VisionTransformer
        >>> vit = VisionTransformer(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        >>> CDAM(vit).attribute(torch.randn(1, 3, 64, 64), target=0).shape
        torch.Size([1, 4, 4])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = packed_model(model)

    @as_captum_calls
    def attribute(
        self, inputs: Float[Tensor, "B I X Y"], target: Target, keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Explain a prediction.

        Args:
            inputs: (B, in_chans, H·p, W·p) images.
            target: a class index; a (B,) tensor with one for each image; a list of indices; "all"; a function of
                the model's output that returns (B,) or (B, M) scores; or a :class:`Concept`.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.

        Returns:
            (B, H, W), or (B, M, H, W) for a list, "all" and functions with several scores.

        Raises:
            TypeError, ValueError: inputs, target or keep do not fit the model, or it drops at random (train mode).
        """
        model, tokens = model_and_tokens(self.model, inputs, target, keep)
        relevance_MT, scores_BM = score_tokens(model, tokens, target)
        return squeeze_maps(as_maps(relevance_MT, tokens), target, scores_BM)


@torch.no_grad()
def model_and_tokens(
    model: VisionTransformer, inputs: Tensor, target: Target, keep: Tensor | None
) -> tuple[VisionTransformer, PackedTokens]:
    """The model that the target is a function of, and the tokens before its last block, without a graph.

    Raises:
        ValueError: the model drops at random.
    """
    check_explainable(model)
    model = without_head(model) if isinstance(target, Concept) else model
    return model, model.before_last_block(model.embed(inputs, keep))


def as_maps(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M H W"]:
    """Values of packed tokens as maps over the grid; prefix tokens are dropped, background is 0."""
    dense_BNM = unpack(values_MT.T, tokens.packing)[:, tokens.num_prefix :]
    return dense_BNM.transpose(1, 2).unflatten(2, tokens.grid_HW)


def squeeze_maps(maps_BMHW: Tensor, target: Target, scores_BM: Tensor) -> Float[Tensor, "..."]:
    """Without the axis M, where the target is one score of each image."""
    return maps_BMHW[:, 0] if gives_one_map(target, scores_BM) else maps_BMHW
