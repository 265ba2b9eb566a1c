"""Gated attention pooling: ABMIL (Ilse, Tomczak, Welling, ICML 2018) and CLAM (Lu et al., Nature BME 2021).

h_t = ReLU(W z_t + b) with a first layer, z_t without; a = softmax_t(w·(tanh(V h_t) ⊙ σ(U h_t))) with the gate,
softmax_t(w·tanh(V h_t)) without; M = Σ_t a_t h_t; logits = classifier(M).
With a branch per class (CLAM_MB) each class c has its own attention row a_c, pooled vector M_c and classifier.

Parameters have CLAM's names. The weights of its instance clustering, which only training uses, are kept but not read.

Dimension key: T tiles, C channels, D channels of h, K classes, A branches (1 or K).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.shapes import Float

__all__ = ["GatedAttentionHead", "GatedScores"]


class GatedScores(nn.Module):
    """The attention scores of each tile, one per branch.

    Args:
        dim: width of h.
        hidden: width of V h.
        branches: A.
        gate: whether scores have the factor σ(U h).
        dropout: dropout probability after tanh and σ.
    """

    def __init__(self, dim: int, hidden: int, branches: int, gate: bool, dropout: float) -> None:
        super().__init__()
        if gate:
            self.attention_a = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Dropout(dropout))
            self.attention_b = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid(), nn.Dropout(dropout))
            self.attention_c = nn.Linear(hidden, branches)
        else:
            self.module = nn.Sequential(
                nn.Linear(dim, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, branches)
            )
        self.gate = gate

    def forward(self, rows_TC: Tensor) -> Tensor:
        """Compute the scores: (T, dim) → (T, A)."""
        if self.gate:
            scores: Tensor = self.attention_c(self.attention_a(rows_TC) * self.attention_b(rows_TC))
            return scores
        plain: Tensor = self.module(rows_TC)
        return plain


class GatedAttentionHead(SlideHead):
    """Attention pooling with or without a gate, a first layer and a branch per class.

    Args:
        in_dim: C.
        num_classes: K.
        hidden: width of the first layer; None pools the embeddings themselves.
        attention_dim: width of the attention's hidden layer.
        branch_per_class: whether each class has its own attention row and classifier (CLAM_MB).
        gate: whether the attention is gated.
        instances: whether to keep CLAM's instance classifiers, which only its training uses.
        dropout: dropout probability.
    """

    kind: ClassVar[str] = "gated_attention"

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        hidden: int | None = 512,
        attention_dim: int = 256,
        branch_per_class: bool = False,
        gate: bool = True,
        instances: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, num_classes)
        self.options = {
            "hidden": hidden,
            "attention_dim": attention_dim,
            "branch_per_class": branch_per_class,
            "gate": gate,
            "instances": instances,
            "dropout": dropout,
        }
        dim, branches = hidden or in_dim, num_classes if branch_per_class else 1
        # CLAM's indices are kept: the first layer is 0, the attention 3.
        first: list[nn.Module] = [nn.Linear(in_dim, hidden), nn.ReLU(), nn.Dropout(dropout)] if hidden else []
        first += [] if hidden else [nn.Identity()] * 3
        self.attention_net = nn.Sequential(*first, GatedScores(dim, attention_dim, branches, gate, dropout))
        self.branch_per_class = branch_per_class
        self.classifiers: nn.Module
        if branch_per_class:
            self.classifiers = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_classes))
        else:
            self.classifiers = nn.Linear(dim, num_classes)
        if instances:
            self.instance_classifiers = nn.ModuleList(nn.Linear(dim, 2) for _ in range(num_classes))

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {"in_dim": self.in_dim, "num_classes": self.num_classes, **self.options}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        return self.classify(*self.rows_and_weights(embeddings_TC))

    def classify(self, rows_TD: Float[Tensor, "T D"], weights_AT: Float[Tensor, "A T"]) -> Float[Tensor, "K"]:
        """Return the logits, given the results of :meth:`rows_and_weights`."""
        pooled = weights_AT @ rows_TD
        if not self.branch_per_class:
            logits: Tensor = self.classifiers(pooled[0])
            return logits
        assert isinstance(self.classifiers, nn.ModuleList), "a branch has a classifier of its own"
        return torch.cat([classifier(row) for classifier, row in zip(self.classifiers, pooled, strict=True)])

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor | None:
        return self.rows_and_weights(embeddings_TC)[1]

    def rows_and_weights(
        self, embeddings_TC: Float[Tensor, "T C"]
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "A T"]]:
        """Return the rows h that are pooled, and the attention over them."""
        rows = self.attention_net[:-1](embeddings_TC)
        return rows, F.softmax(self.attention_net[-1](rows).T, dim=1)
