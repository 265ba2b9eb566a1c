"""HIPT's local and global models as its authors' code builds them, from torch's own modules; nothing of ours is called.

Written from src/models/hipt.py, components.py and vision_transformer.py of clemsgrs/hipt (commit 648ec04).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class RegionViT(nn.Module):
    """VisionTransformer4K."""

    def __init__(self, in_dim: int, dim: int, positions: int, heads: int, depth: int, registers: int) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(in_dim, dim), nn.GELU(), nn.Dropout(0.0))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, positions + 1, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim)) if registers else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, side: int) -> Tensor:
        N = self.pos_embed.shape[1] - 1
        if side * side == N:
            return self.pos_embed
        root = math.isqrt(N)
        grid = self.pos_embed[:, 1:].reshape(1, root, root, -1).permute(0, 3, 1, 2)
        scale = (side + 0.1) / math.sqrt(N)
        grid = F.interpolate(
            grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False, recompute_scale_factor=True
        )
        return torch.cat((self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        side = x.shape[2]
        x = self.phi(x.flatten(2, 3).transpose(1, 2))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(side)
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, 0]


class GatedScores(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(0.25))
        self.attention_b = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid(), nn.Dropout(0.25))
        self.attention_c = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention_c(self.attention_a(x).mul(self.attention_b(x)))


class GlobalHIPT(nn.Module):
    def __init__(self, classes: int, region_dim: int, dim: int) -> None:
        super().__init__()
        self.global_phi = nn.Sequential(nn.Linear(region_dim, dim), nn.ReLU(), nn.Dropout(0.25))
        layer = nn.TransformerEncoderLayer(dim, 3, dim, 0.25, "relu")
        self.global_transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.global_attn_pool = GatedScores(dim)
        self.global_rho = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(0.25))
        self.classifier = nn.Linear(dim, classes)

    def pooled(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        x = self.global_transformer(self.global_phi(regions).unsqueeze(1)).squeeze(1)
        attention = F.softmax(self.global_attn_pool(x).transpose(1, 0), dim=1)
        return attention, torch.mm(attention, x)

    def forward(self, regions: Tensor) -> Tensor:
        return self.classifier(self.global_rho(self.pooled(regions)[1]))


class LocalHIPT(GlobalHIPT):
    def __init__(
        self,
        classes: int,
        patch_dim: int = 48,
        region_dim: int = 24,
        dim: int = 12,
        positions: int = 9,
        heads: int = 6,
        depth: int = 2,
        registers: int = 0,
    ) -> None:
        super().__init__(classes, region_dim, dim)
        self.vit_region = RegionViT(patch_dim, region_dim, positions, heads, depth, registers)

    def regions(self, x: Tensor, pct: Tensor | None = None) -> Tensor:
        """(M, n·n, D) embeddings of patches; pct (M, n·n, tokens) is their share of tissue, by token."""
        mask = None
        if pct is not None:
            prefix = 1 + (0 if self.vit_region.register_tokens is None else self.vit_region.register_tokens.shape[1])
            kept = (pct.sum(dim=-1) / pct[0].numel() > 0).int()
            mask = torch.cat((kept.new_ones((len(kept), prefix)), kept), dim=1)
        side = math.isqrt(x.shape[1])
        return self.vit_region(x.unfold(1, side, side).transpose(1, 2), mask)

    def forward(self, x: Tensor, pct: Tensor | None = None) -> Tensor:
        return super().forward(self.regions(x, pct))
