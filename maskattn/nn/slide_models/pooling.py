"""Mean and max pooling of tile embeddings, followed by a classifier of one or several layers.

z = mean_t h_t, or max_t h_t channel by channel; logits = W_L ReLU(… ReLU(W_1 z + b_1) …) + b_L.

Dimension key: T tiles, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskattn.nn.slide_models.head import SlideHead, TileGrid

__all__ = ["PooledHead"]


class PooledHead(SlideHead):
    """A classifier over the mean or the maximum of the tiles.

    Args:
        in_dim: C.
        num_classes: K.
        pool: "mean" or "max".
        hidden: widths of the classifier's hidden layers.
        dropout: dropout probability after each hidden layer.

    Raises:
        ValueError: ``pool`` is neither.
    """

    kind: ClassVar[str] = "pooled"

    def __init__(
        self, in_dim: int, num_classes: int, pool: str = "mean", hidden: Sequence[int] = (), dropout: float = 0.0
    ) -> None:
        super().__init__(in_dim, num_classes)
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be 'mean' or 'max', got pool={pool!r}")
        self.pool, self.hidden, self.dropout = pool, tuple(hidden), dropout
        layers: list[nn.Module] = []
        width = in_dim
        for next_width in self.hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        self.mlp = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {
            "in_dim": self.in_dim,
            "num_classes": self.num_classes,
            "pool": self.pool,
            "hidden": list(self.hidden),
            "dropout": self.dropout,
        }

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        pooled = embeddings_TC.mean(dim=0) if self.pool == "mean" else embeddings_TC.amax(dim=0)
        logits: Tensor = self.mlp(pooled)
        return logits

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        if self.pool == "max":
            return None
        return torch.full((1, len(embeddings_TC)), 1 / len(embeddings_TC), device=embeddings_TC.device)
