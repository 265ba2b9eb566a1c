"""CLAM's maximum over instances (MIL_fc and MIL_fc_mc): the most confident tile predicts for its slide.

h_t = ReLU(V z_t + a); l_t = W h_t + b; the slide's logits are l_s, those of a single tile s. With two classes s is the
tile with the highest probability of the second class, otherwise the tile with the highest probability of any class.

The choice of s has no gradient, so the other tiles get relevance 0. On a path from 0 to z the tile chosen at z is kept.
Its relevance then sums to l_s(z_s) − l_s(0), which is f(z) − f(0), since tiles of zeros all have the same logits.

Parameters have the names of MIL_fc_mc in CLAM 53e2409.

Dimension key: T tiles, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskattn.nn.slide_models.head import SlideHead, TileGrid

__all__ = ["BestInstanceHead"]


class BestInstanceHead(SlideHead):
    """The logits of the most confident tile.

    Args:
        in_dim: C.
        num_classes: K.
        hidden: width of h.
        dropout: dropout probability after the first layer.
    """

    kind: ClassVar[str] = "best_instance"

    def __init__(self, in_dim: int, num_classes: int, hidden: int = 512, dropout: float = 0.0) -> None:
        super().__init__(in_dim, num_classes)
        self.hidden, self.dropout = hidden, dropout
        self.fc = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.classifiers = nn.Linear(hidden, num_classes)

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {
            "in_dim": self.in_dim,
            "num_classes": self.num_classes,
            "hidden": self.hidden,
            "dropout": self.dropout,
        }

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        logits_TK: Tensor = self.classifiers(self.fc(embeddings_TC))
        return logits_TK[self._best(logits_TK)]

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        best = self._best(self.classifiers(self.fc(embeddings_TC)))
        return embeddings_TC.new_zeros(1, len(embeddings_TC)).index_fill_(1, best[None], 1)

    def along_path(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            best = self._best(self.classifiers(self.fc(embeddings_TC)))
        return lambda at_TC: self.classifiers(self.fc(at_TC[best]))

    def _best(self, logits_TK: Tensor) -> Tensor:
        """Return the index of the tile whose logits are the slide's."""
        probabilities_TK = logits_TK.detach().softmax(dim=1)
        return (probabilities_TK[:, 1] if self.num_classes == 2 else probabilities_TK.amax(dim=1)).argmax()
