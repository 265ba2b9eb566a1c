"""Concepts as targets: the similarity of an image to a set of example images.

The concept is the mean feature of the examples, that is, of the head's input. An image's score is the dot product or
the cosine of its own feature with the concept.

Source: Brocki, Binda, Chung, arXiv 2312.02364, for the concept vectors; the cosine is an addition of this package.

Dimension key: B images, C channels, M concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.packed_model import check_explainable, packed_model, without_head
from maskattn.shapes import Bool, Float

__all__ = ["Concept"]


class Concept:
    """A target for models with or without a head; the head is not used.

    Args:
        direction: (C,), or (M, C) for several concepts at once.
        similarity: "dot" or "cosine".

    Raises:
        ValueError: the direction has another shape, or there is no such similarity.

    Example:
        >>> from maskattn.explain import CDAM
        >>> from maskattn.nn import VisionTransformer
        >>> vit = VisionTransformer(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        >>> concept = Concept.from_images(vit, torch.randn(5, 3, 64, 64))
        >>> CDAM(vit).attribute(torch.randn(1, 3, 64, 64), target=concept).shape
        torch.Size([1, 4, 4])
    """

    def __init__(self, direction: Float[Tensor, "..."], similarity: Literal["dot", "cosine"] = "dot") -> None:
        if direction.ndim not in (1, 2):
            raise ValueError(f"a concept's direction must be (C,) or (M, C), got shape {tuple(direction.shape)}")
        if similarity not in ("dot", "cosine"):
            raise ValueError(f"similarity must be 'dot' or 'cosine', got similarity={similarity!r}")
        self.direction = direction.detach()
        self.similarity = similarity

    @classmethod
    @torch.no_grad()
    def from_images(
        cls,
        model: nn.Module,
        images: Float[Tensor, "B I X Y"],
        keep: Bool[Tensor, "..."] | None = None,
        *,
        similarity: Literal["dot", "cosine"] = "dot",
        batch_size: int = 32,
    ) -> Concept:
        """Build a concept from the mean feature of example images.

        Args:
            model: the model to be explained; see :func:`maskattn.explain.packed_model.packed_model`.
            images: (B, in_chans, H·p, W·p), B ≥ 1.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.
            similarity: "dot" or "cosine".
            batch_size: images that go through the model at a time.

        Raises:
            TypeError, ValueError: images or keep do not fit the model, there is no image, or dropout is active.
        """
        if len(images) == 0:
            raise ValueError("a concept is the mean of at least one example image, got B=0")
        encoder = without_head(packed_model(model))
        check_explainable(encoder)
        keeps: Sequence[Tensor | None] = (
            [None] * -(-len(images) // batch_size) if keep is None else keep.split(batch_size)
        )
        batches = zip(images.split(batch_size), keeps, strict=True)
        return cls(torch.cat([encoder(x, kept) for x, kept in batches]).mean(dim=0), similarity)

    def __call__(self, features_BC: Float[Tensor, "B C"]) -> Float[Tensor, "..."]:
        """Map (B, C) features to (B,) scores, or (B, M) for several concepts.

        Raises:
            ValueError: the features have another width than the concept.
        """
        if features_BC.shape[-1] != self.direction.shape[-1]:
            raise ValueError(
                f"this concept has {self.direction.shape[-1]} channels and the model's features {features_BC.shape[-1]}"
                "; make it with Concept.from_images on the same model"
            )
        direction = self.direction.to(features_BC)
        if self.similarity == "cosine":
            features_BC, direction = F.normalize(features_BC, dim=-1), F.normalize(direction, dim=-1)
        return features_BC @ direction.mT if direction.ndim == 2 else features_BC @ direction
