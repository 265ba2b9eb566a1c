"""Pooling of packed tokens into one feature vector for each image.

Dimension key: B images, P prefix tokens (class token, registers), T packed tokens (prefix tokens included), C channels,
D channels of a CoCa pool's query, H heads.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from maskattn.nn.blocks import BlockOptions
from maskattn.nn.mlps import Mlp
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.packing import unpack
from maskattn.shapes import Float

__all__ = ["AttentionPool", "CoCaPool", "mean_of_grid", "pool_of"]


class AttentionPool(nn.Module):
    """Attention pooling by one learnt query over the grid tokens, then an MLP: timm's ``AttentionPoolLatent``.

    Args:
        dim, num_heads: C and H.
        options: the blocks' options; the pool shares their MLP ratio, activation and ε.
    """

    def __init__(self, dim: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.impl = options.attention.impl
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=options.attention.norm_eps)
        self.mlp = Mlp(dim, int(dim * options.mlp_ratio), options.act_layer)

    def forward(self, tokens: PackedTokens) -> Float[Tensor, "B C"]:
        """Pool the grid tokens of each image."""
        grid = tokens.grid()
        x = self.proj(_read(self.q(self.latent), self.kv(grid.rows_TC), grid, self.num_heads, self.impl))
        return (x + self.mlp(self.norm(x)))[:, 0]


class CoCaPool(nn.Module):
    """Attention pooling by one learnt query over all tokens, prefix tokens too, as CoCa and CONCH read an image.

    LayerNorm(MultiheadAttention(LayerNorm(query), LayerNorm(tokens))); the query, and so the output, has a width of its
    own. The norms' ε is 1e-5.

    Args:
        dim: C.
        width: D.
        num_heads: H.
        impl: the implementation of attention; None takes the best.

    Raises:
        ValueError: num_heads does not divide the width.
    """

    def __init__(self, dim: int, width: int, num_heads: int, impl: str | None = None) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"pool_heads must divide pool_dim, got pool_dim={width}, pool_heads={num_heads}")
        self.num_heads = num_heads
        self.impl = impl
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.norm_q = nn.LayerNorm(width)
        self.norm_k = nn.LayerNorm(dim)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(dim, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: PackedTokens) -> Float[Tensor, "B D"]:
        """Pool the tokens of each image."""
        q, kv = self.q(self.norm_q(self.query)), self.kv(self.norm_k(tokens.rows_TC))
        pooled: Tensor = self.norm(self.proj(_read(q, kv, tokens, self.num_heads, self.impl)))
        return pooled[:, 0]


def pool_of(
    global_pool: str, dim: int, num_heads: int, pool_dim: int, pool_heads: int, options: BlockOptions
) -> AttentionPool | CoCaPool | None:
    """Return the attention pool of a model; None if it pools without one."""
    if global_pool == "map":
        return AttentionPool(dim, num_heads, options)
    return CoCaPool(dim, pool_dim, pool_heads, options.attention.impl) if global_pool == "coca" else None


def mean_of_grid(tokens: PackedTokens) -> Float[Tensor, "B C"]:
    """Return the mean of each image's grid tokens; 0 for an image without any."""
    sums = unpack(tokens.rows_TC, tokens.packing)[:, tokens.num_prefix :].sum(dim=1)
    counts = tokens.packing.cu_seqlens.diff() - tokens.own_prefix
    if tokens.shards is not None:
        sums, counts = tokens.of_all(sums), counts.new_tensor(tokens.shards.total) - tokens.num_prefix
    return sums / counts.clamp(min=1)[:, None]


def _read(q_11D: Tensor, kv_TE: Tensor, tokens: PackedTokens, num_heads: int, impl: str | None) -> Tensor:
    """Return the attention output (B, 1, D) of one query; E = 2·D, keys before values."""
    q = q_11D.unflatten(-1, (num_heads, -1)).expand(tokens.packing.batch_size, -1, -1, -1)
    k, v = kv_TE.unflatten(-1, (2, num_heads, -1)).unbind(1)
    return cast(Tensor, tokens.read(q, k, v, impl=impl)).flatten(-2)
