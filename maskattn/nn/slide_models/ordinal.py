"""Ordered classes on any slide head: CORN (Shi, Cao, Raschka, arXiv 2111.08851), the continuation-ratio model.

The head below gives K − 1 outputs f_j, of which σ(f_j) = P(y > j | y ≥ j) is the chance to go on to a higher class:

    P(y = k) = Π_{j<k} σ(f_j) · (1 − σ(f_k)),   σ(f_{K−1}) = 0;   logits_k = log P(y = k).

The negative log-likelihood of P is the paper's loss: each case counts in the binary tasks of the classes that it has
reached. The softmax of the logits is P itself, so that scores, temperature and maps are those of any classifier.

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
    """Ordered classes on a head of one output fewer.

    Args:
        below: the head, of K − 1 outputs; or its arguments.
        below_kind: of which kind it is, where ``below`` are arguments.
        impl: implementation of its attention, where ``below`` are arguments; None takes the best.
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

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (as of SlideHead)
        return {"below_kind": self.below.kind, "below": self.below.arguments()}

    def logits(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        return ordinal_logits(self.below.logits(embeddings_TC, coords_um_T2, grid))

    def attention(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        return self.below.attention(embeddings_TC, coords_um_T2, grid)

    def rollout(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        return self.below.rollout(embeddings_TC, coords_um_T2, grid)

    def along_path(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Callable[[Tensor], Tensor]:
        of_below = self.below.along_path(embeddings_TC, coords_um_T2, grid)
        return lambda at_TC: ordinal_logits(of_below(at_TC))


def ordinal_logits(going_on_J: Tensor) -> Tensor:
    """(..., K − 1) outputs f → (..., K) log-probabilities of the classes."""
    reached_J = F.logsigmoid(going_on_J).cumsum(dim=-1)
    reached_K = torch.cat([torch.zeros_like(reached_J[..., :1]), reached_J], dim=-1)
    stopping_K = torch.cat([F.logsigmoid(-going_on_J), torch.zeros_like(reached_J[..., :1])], dim=-1)
    return reached_K + stopping_K
