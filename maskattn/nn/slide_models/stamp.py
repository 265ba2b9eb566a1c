"""STAMP's vision transformer with its own kind of ALiBi (El Nahhas et al., Nature Protocols 2024; STAMP 2.5).

A class token at position (0, 0) precedes the projected tiles. The weights of each head are

    w_qk = softmax_k(q·k/√D) − β · |p_q − p_k| / μ,

where the penalty is subtracted after the softmax, p are positions in µm, μ is the mean distance in the training slides
and β is learnt. Rows therefore do not sum to 1, and a distant tile can have a negative weight. Distances are computed
for a chunk of queries at a time, so that nothing of size N × N is held, or kept for the backward pass.

Parameters have STAMP's names. Its transformer without ALiBi is :class:`maskattn.nn.slide_models.vit.ViTHead`.

Dimension key: T tiles, N tokens with the class token, C channels, H heads, D head width, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskattn.nn.slide_models.head import SlideHead, TileGrid

__all__ = ["DistanceViTHead"]

_QUERIES_AT_ONCE = 512


class RunningMean(nn.Module):
    """The buffer of μ, the running mean of training."""

    running_mean: Tensor
    items_so_far: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.ones(1))
        self.register_buffer("items_so_far", torch.ones(1))


class DistancePenalty(nn.Module):
    """The parameters of a head's penalty, β and μ."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_distance = RunningMean()
        self.bias_scale = nn.Parameter(torch.rand(1))

    def factor(self) -> Tensor:
        """Return β / μ."""
        return self.bias_scale / self.scale_distance.running_mean


class DistanceAttention(nn.Module):
    """Attention with the penalty of distance after the softmax.

    Args:
        dim: C.
        num_heads: H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        width = dim // num_heads
        self.query_encoders = nn.ModuleList(nn.Linear(dim, width) for _ in range(num_heads))
        self.key_encoders = nn.ModuleList(nn.Linear(dim, width) for _ in range(num_heads))
        self.value_encoders = nn.ModuleList(nn.Linear(dim, width) for _ in range(num_heads))
        self.attentions = nn.ModuleList(DistancePenalty() for _ in range(num_heads))
        self.fc = nn.Linear(dim, dim)

    def forward(self, x_NC: Tensor, coords_N2: Tensor) -> Tensor:
        """Attend with every token: (N, C), positions (N, 2) in µm → (N, C)."""
        q, k, v = (
            torch.stack([encoder(x_NC) for encoder in encoders])  # [H, N, D]
            for encoders in (self.query_encoders, self.key_encoders, self.value_encoders)
        )
        factor_H = torch.cat([cast(DistancePenalty, penalty).factor() for penalty in self.attentions])
        chunks = []
        for first in range(0, len(x_NC), _QUERIES_AT_ONCE):
            queries = slice(first, first + _QUERIES_AT_ONCE)
            operands = q[:, queries], k, v, coords_N2[queries], coords_N2, factor_H
            if torch.is_grad_enabled() and len(x_NC) > _QUERIES_AT_ONCE:
                # The backward pass recomputes the distances instead of keeping them.
                chunks.append(checkpoint(_penalised, *operands, use_reentrant=False))
            else:
                chunks.append(_penalised(*operands))
        rows: Tensor = self.fc(torch.cat(chunks, dim=1).transpose(0, 1).flatten(1))
        return rows

    def row(self, x_NC: Tensor, coords_N2: Tensor) -> Tensor:
        """Return the weights of the first token's query, penalty included: (N, C), (N, 2) in µm → (H, N)."""
        rows = []
        distance_N = (coords_N2 - coords_N2[0]).square().sum(dim=1).sqrt()
        for query, key, penalty in zip(self.query_encoders, self.key_encoders, self.attentions, strict=True):
            q_D, k_ND = query(x_NC[0]), key(x_NC)
            weights_N = (k_ND @ q_D * len(q_D) ** -0.5).softmax(dim=0)
            rows.append(weights_N - cast(DistancePenalty, penalty).factor() * distance_N)
        return torch.stack(rows)


def _penalised(q: Tensor, k: Tensor, v: Tensor, coords_R2: Tensor, coords_N2: Tensor, factor_H: Tensor) -> Tensor:
    distances_RN = torch.cdist(coords_R2, coords_N2, compute_mode="donot_use_mm_for_euclid_dist")
    attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    return attended - factor_H[:, None, None] * (distances_RN @ v)


class DistanceBlock(nn.ModuleList):
    """Pre-norm attention and MLP, as a list, for STAMP's parameter names."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        attention = nn.Module()
        attention.norm = nn.LayerNorm(dim)
        attention.mhsa = DistanceAttention(dim, num_heads)
        mlp = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )
        super().__init__([attention, mlp])

    def forward(self, x_NC: Tensor, coords_N2: Tensor) -> Tensor:
        """Compute the block's output: (N, C), positions (N, 2) in µm → (N, C)."""
        attention: Any = self[0]
        x_NC = x_NC + attention.mhsa(attention.norm(x_NC), coords_N2)
        return x_NC + cast(Tensor, self[1](x_NC))


class DistanceViTHead(SlideHead):
    """STAMP's transformer with ALiBi.

    Args:
        in_dim: C of the embeddings.
        num_classes: K.
        dim: C of the tokens.
        depth: number of blocks.
        num_heads: H.
        hidden: width of the MLPs' hidden layer.
        dropout: dropout probability.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    kind: ClassVar[str] = "stamp_alibi"
    reads_um = True
    why_no_rollout = "whose weights do not sum to 1: it subtracts a penalty of distance after the softmax"

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        dim: int = 512,
        depth: int = 2,
        num_heads: int = 8,
        hidden: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_dim, num_classes)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim}, num_heads={num_heads}")
        self.options = {"dim": dim, "depth": depth, "num_heads": num_heads, "hidden": hidden, "dropout": dropout}
        self.class_token = nn.Parameter(torch.randn(dim))
        self.project_features = nn.Sequential(nn.Linear(in_dim, dim), nn.GELU(), nn.Dropout(dropout))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(DistanceBlock(dim, num_heads, hidden, dropout) for _ in range(depth))
        self.transformer.norm = nn.LayerNorm(dim)
        self.mlp_head = nn.Sequential(nn.Linear(dim, num_classes))

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        return {"in_dim": self.in_dim, "num_classes": self.num_classes, **self.options}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        assert coords_um_T2 is not None, "forward has checked that there are positions"
        coords_N2 = F.pad(coords_um_T2.to(embeddings_TC), (0, 0, 1, 0))
        x_NC = torch.cat([self.class_token[None], self.project_features(embeddings_TC)])
        transformer: Any = self.transformer
        for block in transformer.layers:
            x_NC = block(x_NC, coords_N2)
        logits: Tensor = self.mlp_head(transformer.norm(x_NC[0]))
        return logits

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        self.check(embeddings_TC, coords_um_T2, grid)
        assert coords_um_T2 is not None, "check has refused calls without positions"
        coords_N2 = F.pad(coords_um_T2.to(embeddings_TC), (0, 0, 1, 0))
        x_NC = torch.cat([self.class_token[None], self.project_features(embeddings_TC)])
        layers: Any = self.transformer.layers
        for block in layers[:-1]:
            x_NC = block(x_NC, coords_N2)
        attention = layers[-1][0]
        rows_AN: Tensor = attention.mhsa.row(attention.norm(x_NC), coords_N2)
        return rows_AN[:, 1:]
