"""TITAN (Ding et al., arXiv 2411.19666) with its attentional pooling and the linear head of its fine-tuning.

The encoder is a transformer with 2-D ALiBi. In "parallel" pooling, a learnt query attends to all tokens after the last
norm, the class token included: e = MultiheadAttention(LayerNorm(query), LayerNorm(tokens)) with 8 heads; logits =
W e + b. In "cascade" pooling, this query attends to the outputs of 128 learnt queries, which attend to the tokens. The
embeddings are CONCH v1.5's of tiles of 512 px at 20x.

The head's attention is that of the last query, one row per attention head; in a cascade it is multiplied by the weights
of the 128 queries, averaged over their heads.

Dimension key: T tiles, N tokens with the class token, C channels, K classes, Q queries.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.packed_tokens import PackedTokens
from maskattn.nn.slide_models.attention_rows import rolled_out
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.vit import tokens_on_grid
from maskattn.nn.vit import VisionTransformer

__all__ = ["AttentionalPooler", "TitanHead"]


class AttentionalPooler(nn.Module):
    """Attention of learnt queries to tokens; parameters have the names of open_clip and TITAN.

    Args:
        dim: C.
        queries: Q.
        num_heads: number of attention heads.
    """

    def __init__(self, dim: int, queries: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * F.normalize(nn.Linear(dim, queries).weight.detach()))
        self.attn = nn.MultiheadAttention(dim, num_heads)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)

    def forward(self, tokens_NC: Tensor) -> Tensor:
        """Return the queries' outputs: (N, C) → (Q, C)."""
        keys = self.ln_k(tokens_NC)
        outputs: Tensor = self.attn(self.ln_q(self.query), keys, keys, need_weights=False)[0]
        return outputs

    def weights(self, tokens_NC: Tensor) -> Tensor:
        """Return the attention weights: (N, C) → (H, Q, N), H the attention heads."""
        keys = self.ln_k(tokens_NC)
        weights: Tensor = self.attn(self.ln_q(self.query), keys, keys, average_attn_weights=False)[1]
        return weights


class TitanHead(SlideHead):
    """TITAN's slide encoder, its pooling and a linear head.

    Args:
        vit: TITAN's transformer, or the arguments that rebuild it: patch_size 1, no head.
        num_classes: K.
        pool: "parallel" or "cascade".
        queries: Q of the first pooler, which only a cascade has.
        pool_heads: number of attention heads of the pooling.
        impl: implementation of the attention if ``vit`` is a dict of arguments; None takes the best.

    Raises:
        ValueError: ``pool`` is neither.
    """

    kind: ClassVar[str] = "titan"
    has_layers = True
    reads_grid = True

    def __init__(
        self,
        vit: VisionTransformer | dict[str, Any],
        num_classes: int,
        pool: str = "parallel",
        queries: int = 128,
        pool_heads: int = 8,
        impl: str | None = None,
    ) -> None:
        encoder = VisionTransformer(**{**vit, "impl": impl}) if isinstance(vit, dict) else vit
        super().__init__(encoder.patch_embed.in_chans, num_classes)
        if pool not in ("parallel", "cascade"):
            raise ValueError(f"pool must be 'parallel' or 'cascade', got pool={pool!r}")
        self.options = {"pool": pool, "queries": queries, "pool_heads": pool_heads}
        self.vit, dim = encoder, encoder.embed_dim
        self.attn_pool = AttentionalPooler(dim, queries, pool_heads) if pool == "cascade" else None
        self.attn_pool_contrastive = AttentionalPooler(dim, 1, pool_heads)
        self.head = nn.Linear(dim, num_classes)

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (documented in SlideHead)
        vit = {name: value for name, value in self.vit.arguments.items() if name != "impl"}
        return {"vit": vit, "num_classes": self.num_classes, **self.options}

    def logits(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        rows = self._normed(tokens_on_grid(self.vit, embeddings_TC, grid)[0])
        if self.attn_pool is not None:
            rows = self.attn_pool(rows)
        logits: Tensor = self.head(self.attn_pool_contrastive(rows)[0])
        return logits

    def attention(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        tokens, order_T = tokens_on_grid(self.vit, embeddings_TC, grid)
        rows_AT = self._pooling(self._normed(tokens))[:, tokens.num_prefix :]
        return torch.empty_like(rows_AT).index_copy_(1, order_T, rows_AT)

    def rollout(  # noqa: D102 (documented in SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None = None, grid: TileGrid | None = None
    ) -> Tensor:
        tokens, order_T = tokens_on_grid(self.vit, embeddings_TC, grid)
        row_N = self._pooling(self._normed(tokens)).mean(dim=0)
        row_T = rolled_out(self.vit, tokens, row_N)[tokens.num_prefix :]
        return torch.empty_like(row_T).index_copy_(0, order_T, row_T)

    def _normed(self, tokens: PackedTokens) -> Tensor:
        rows: Tensor = self.vit.norm(self.vit.run_blocks(tokens).rows_TC)
        return rows

    def _pooling(self, rows_NC: Tensor) -> Tensor:
        """Return the last query's weights over the tokens, one row per head: (N, C) → (A, N)."""
        if self.attn_pool is None:
            return self.attn_pool_contrastive.weights(rows_NC)[:, 0]
        last_AQ = self.attn_pool_contrastive.weights(self.attn_pool(rows_NC))[:, 0]
        return last_AQ @ self.attn_pool.weights(rows_NC).mean(dim=0)
