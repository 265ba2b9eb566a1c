"""Zero-shot scores of a slide: the cosines of tiles with each concept's vector, pooled as in MI-Zero.

    s_tk = temperature · cos(z_t, w_k),      f_k = mean of s_tk over concept k's pool,

where the pool is all tiles, or the best few of each concept. With |z_t| held constant the score is linear in the tiles,
f_k = Σ_t z_t·γ_kt with γ_kt = share_kt · temperature · ŵ_k / |z_t|, so that a tile's relevance is its term of the mean.
(The gradient at z is no substitute: a cosine does not change with the length of z, so that z·∂cos/∂z is 0.)

Source: Lu et al., arXiv 2306.07831 (MI-Zero), for the pooling.

Dimension key: T tiles, C channels of the shared space, K concepts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.shapes import Float

__all__ = ["ZeroShotHead"]


class ZeroShotHead(SlideHead):
    """The mean score for each of K concepts, over all tiles or over the concept's best.

    Args:
        in_dim: C.
        num_classes: K.
        best: number of tiles pooled for each concept; None pools all.
        temperature: factor of the cosine.

    Attributes:
        vectors: (K, C), one non-zero vector per concept.

    Raises:
        ValueError: ``best`` is less than 1.
    """

    kind: ClassVar[str] = "zero_shot"

    def __init__(self, in_dim: int, num_classes: int, best: int | None = None, temperature: float = 100.0) -> None:
        super().__init__(in_dim, num_classes)
        if best is not None and best < 1:
            raise ValueError(f"at least one tile must be pooled, got best={best}; None pools all")
        self.best, self.temperature = best, temperature
        self.vectors = nn.Parameter(torch.ones(num_classes, in_dim), requires_grad=False)

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {
            "in_dim": self.in_dim,
            "num_classes": self.num_classes,
            "best": self.best,
            "temperature": self.temperature,
        }

    def tile_scores(self, embeddings_TC: Float[Tensor, "T C"]) -> Float[Tensor, "K T"]:
        """Return the score of each tile for each concept."""
        directions = F.normalize(self.vectors.to(embeddings_TC), dim=1)
        return self.temperature * directions @ F.normalize(embeddings_TC, dim=1).mT

    def shares(self, scores_KT: Float[Tensor, "K T"]) -> Float[Tensor, "K T"]:
        """Return each tile's weight in the pool; the weights of a concept sum to 1."""
        count = min(self.best or scores_KT.shape[1], scores_KT.shape[1])
        pooled = scores_KT.detach().topk(count, dim=1).indices
        return torch.zeros_like(scores_KT).scatter_(1, pooled, 1 / count)

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        scores_KT = self.tile_scores(embeddings_TC)
        return (self.shares(scores_KT) * scores_KT).sum(dim=1)

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        return self.shares(self.tile_scores(embeddings_TC))

    def contributions(self, embeddings_TC: Float[Tensor, "T C"]) -> Float[Tensor, "K T"] | None:  # noqa: D102
        scores_KT = self.tile_scores(embeddings_TC)
        return self.shares(scores_KT) * scores_KT

    def linear_form(self, embeddings_TC: Float[Tensor, "T C"]) -> Float[Tensor, "K T C"] | None:  # noqa: D102
        shares_KT = self.shares(self.tile_scores(embeddings_TC))
        scale_KT = self.temperature * shares_KT / embeddings_TC.norm(dim=1).clamp(min=1e-12)
        return scale_KT[..., None] * F.normalize(self.vectors.to(embeddings_TC), dim=1)[:, None]
