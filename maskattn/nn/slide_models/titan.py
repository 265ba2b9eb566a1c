"""TITAN (Ding et al., arXiv 2411.19666) with its attentional pooling and a linear head, as its fine-tuning has it.

The transformer with 2-D ALiBi gives every token after the last norm; a learnt query reads them all, class token too:
e = MultiheadAttention(LayerNorm(query), LayerNorm(tokens)), 8 heads; logits = W e + b. ("Parallel" pooling; where it is
a "cascade", the query reads what 128 other queries have read.) Features are CONCH v1.5's of tiles of 512 px at 20x.

Dimension key: T tiles, N tokens with the class token, C channels, K classes, Q queries.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.vit import tokens_on_grid
from maskattn.nn.vit import VisionTransformer

__all__ = ["AttentionalPooler", "TitanHead"]


class AttentionalPooler(nn.Module):
    """Learnt queries that read tokens; parameters are named as open_clip's and TITAN's.

    Args:
        dim: C.
        queries: Q.
        num_heads: of the attention.
    """

    def __init__(self, dim: int, queries: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * F.normalize(nn.Linear(dim, queries).weight.detach()))
        self.attn = nn.MultiheadAttention(dim, num_heads)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(dim)

    def forward(self, tokens_NC: Tensor) -> Tensor:
        """(N, C) → (Q, C)."""
        keys = self.ln_k(tokens_NC)
        read: Tensor = self.attn(self.ln_q(self.query), keys, keys, need_weights=False)[0]
        return read


class TitanHead(SlideHead):
    """TITAN's slide encoder, its pooling and a linear head.

    Args:
        vit: TITAN's transformer, or the arguments of one: patch_size 1, no head.
        num_classes: K.
        pool: "parallel" or "cascade".
        queries: of the first pooler, which only a cascade reads.
        pool_heads: heads of the pooling's attention.
        impl: implementation of the attention, where ``vit`` are arguments; None takes the best.

    Raises:
        ValueError: there is no such pooling.
    """

    kind: ClassVar[str] = "titan"
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

    def arguments(self) -> dict[str, Any]:  # noqa: D102 (as of SlideHead)
        vit = {name: value for name, value in self.vit.arguments.items() if name != "impl"}
        return {"vit": vit, "num_classes": self.num_classes, **self.options}

    def logits(  # noqa: D102 (as of SlideHead)
        self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None
    ) -> Tensor:
        tokens = self.vit.run_blocks(tokens_on_grid(self.vit, embeddings_TC, grid)[0])
        rows = self.vit.norm(tokens.rows_TC)
        if self.attn_pool is not None:
            rows = self.attn_pool(rows)
        logits: Tensor = self.head(self.attn_pool_contrastive(rows)[0])
        return logits
