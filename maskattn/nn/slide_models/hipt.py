"""HIPT's slide level: a transformer over a slide's regions, and gated attention pooling.

    x_r = ReLU(W z_r + b);  h = two post-norm transformer layers over all x_r, without positions;
    a = softmax_r(w·(tanh(V h_r) ⊙ σ(U h_r)));  logits = classifier(ReLU(ρ(Σ_r a_r h_r))).

Parameters have the names of HIPT's checkpoints: ``global_phi.0``, ``global_transformer.layers.i``,
``global_attn_pool.attention_{a,b}.0``, ``global_attn_pool.attention_c``, ``global_rho.0``, ``classifier``. Regions
without tissue are excluded from the input.

Source: Chen et al., CVPR 2022 (arXiv 2206.02647); the layout is that of clemsgrs/hipt, commit 648ec04, which soma
shares.

Dimension key: T regions with tissue, C channels of their embeddings, D channels of the slide level, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.multihead import MultiheadAttention
from maskattn.nn.slide_models.attention_rows import carry_down
from maskattn.nn.slide_models.gated_attention import GatedScores
from maskattn.nn.slide_models.head import SlideHead, TileGrid

__all__ = ["HIPTHead"]

_HEADS, _LAYERS = 3, 2  # of HIPT's slide transformer


class HIPTHead(SlideHead):
    """HIPT's slide level over the embeddings of regions with tissue, in any order.

    Args:
        in_dim: C.
        num_classes: K.
        embed_dim: D; None takes C.
        num_heads: number of the transformer's attention heads.
        depth: number of the transformer's layers.
        dropout: dropout probability.
        impl: implementation of the attention; None takes the best.
    """

    kind: ClassVar[str] = "hipt"
    has_layers = True

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int | None = None,
        num_heads: int = _HEADS,
        depth: int = _LAYERS,
        dropout: float = 0.25,
        impl: str | None = None,
    ) -> None:
        super().__init__(in_dim, num_classes)
        dim = embed_dim or in_dim
        self.options = {"embed_dim": dim, "num_heads": num_heads, "depth": depth, "dropout": dropout}
        self.global_phi = nn.Sequential(nn.Linear(in_dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.global_transformer = _Layers(dim, num_heads, depth, dropout, impl)
        self.global_attn_pool = GatedScores(dim, dim, 1, True, dropout)
        self.global_rho = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(dim, num_classes)

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {"in_dim": self.in_dim, "num_classes": self.num_classes, **self.options}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        rows_TD, weights_1T = self._rows_and_weights(embeddings_TC)
        logits_K: Tensor = self.classifier(self.global_rho((weights_1T @ rows_TD)[0]))
        return logits_K

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        return self._rows_and_weights(embeddings_TC)[1]

    def rollout(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        row_T = self.attention(embeddings_TC)[0]
        inputs = [self.global_phi(embeddings_TC)]
        for layer in self.global_transformer.layers:
            inputs.append(layer(inputs[-1]))
        for layer, rows_TD in reversed(list(zip(self.global_transformer.layers, inputs, strict=False))):
            row_T = (row_T + carry_down(row_T, *layer.queries_and_keys(rows_TD))) / 2
        return row_T

    def _rows_and_weights(self, embeddings_TC: Tensor) -> tuple[Tensor, Tensor]:
        rows_TD = self.global_transformer(self.global_phi(embeddings_TC))
        return rows_TD, F.softmax(self.global_attn_pool(rows_TD).T, dim=1)


class _Layers(nn.Module):
    def __init__(self, dim: int, num_heads: int, depth: int, dropout: float, impl: str | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_PostNormLayer(dim, num_heads, dropout, impl) for _ in range(depth))

    def forward(self, rows_TD: Tensor) -> Tensor:
        for layer in self.layers:
            rows_TD = layer(rows_TD)
        return rows_TD


class _PostNormLayer(nn.Module):
    """An ``nn.TransformerEncoderLayer`` with HIPT's arguments: ReLU, and an MLP as wide as its input."""

    def __init__(self, dim: int, num_heads: int, dropout: float, impl: str | None) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout, batch_first=True, impl=impl)
        self.linear1, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def queries_and_keys(self, rows_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and the keys: (T, D) → (H, T, D / H) each."""
        attention = self.self_attn
        qkv = F.linear(rows_TD, attention.in_proj_weight, attention.in_proj_bias)
        q, k, _ = qkv.unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
        return q, k

    def forward(self, rows_TD: Tensor) -> Tensor:
        sequence = rows_TD[None]
        attended = self.self_attn(sequence, sequence, sequence, need_weights=False)[0][0]
        rows_TD = self.norm1(rows_TD + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(rows_TD)))
        result: Tensor = self.norm2(rows_TD + self.dropout(self.linear2(hidden)))
        return result
