"""Ordered classes for any slide head by CORN, the continuation-ratio model (Shi, Cao, Raschka, arXiv 2111.08851).

The inner head has K − 1 outputs f_j; σ(f_j) = P(y > j | y ≥ j) is the probability of exceeding class j once reached:

    P(y = k) = Π_{j<k} σ(f_j) · (1 − σ(f_k)),   σ(f_{K−1}) = 0;   logits_k = log P(y = k).

The negative log-likelihood of P is the paper's loss, in which each case counts in the binary tasks of the classes that
it reaches. The softmax of the logits is P itself, so that scores, temperature and maps work as for any classifier.

Dimension key: T tiles, C channels, K classes, A attention rows, J = K − 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.kinds import head_of_kind

__all__ = ["OrdinalHead", "ordinal_logits"]


class OrdinalHead(SlideHead):
    """Ordered classes from a head with one output fewer.

    Args:
        below: the inner head, with K − 1 outputs, or the arguments that rebuild it.
        below_kind: kind of the inner head if ``below`` is a mapping of arguments.
        impl: implementation of its attention if ``below`` is a mapping of arguments; None takes the best.
    """

    kind: ClassVar[str] = "ordinal"

    def __init__(
        self, below: SlideHead | Mapping[str, Any], below_kind: str | None = None, impl: str | None = None
    ) -> None:
        built = below if isinstance(below, SlideHead) else head_of_kind(below_kind or "", below, impl)
        super().__init__(built.in_dim, built.num_classes + 1)
        self.below = built
        self.reads_grid, self.reads_um = built.reads_grid, built.reads_um
        self.has_layers, self.why_no_rollout = built.has_layers, built.why_no_rollout
        self.reads_divided_tiles = built.reads_divided_tiles

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {"below_kind": self.below.kind, "below": self.below.arguments()}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        return ordinal_logits(self.below.logits(embeddings_TC, coords_um_T2, grid))

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        return self.below.attention(embeddings_TC, coords_um_T2, grid)

    def rollout(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        return self.below.rollout(embeddings_TC, coords_um_T2, grid)

    def along_path(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Callable[[Tensor], Tensor]:
        outputs_at = self.below.along_path(embeddings_TC, coords_um_T2, grid)
        return lambda at_TC: ordinal_logits(outputs_at(at_TC))


def ordinal_logits(outputs_J: Tensor) -> Tensor:
    """Compute log-probabilities of the classes (..., K) from the inner head's outputs f (..., K − 1)."""
    reached_J = F.logsigmoid(outputs_J).cumsum(dim=-1)
    reached_K = torch.cat([torch.zeros_like(reached_J[..., :1]), reached_J], dim=-1)
    stopping_K = torch.cat([F.logsigmoid(-outputs_J), torch.zeros_like(reached_J[..., :1])], dim=-1)
    return reached_K + stopping_K
