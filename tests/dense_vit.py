"""Plain ViTs written out densely, sharing the packed model's weights: what it must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.nn import VisionTransformer
from maskattn.nn.blocks import Block


def dense_masked_logits(model: VisionTransformer, x: Tensor, keep_BHW: Tensor) -> Tensor:
    """Every token goes through every layer; the softmax leaves out background keys."""
    tokens, keep = _dense_tokens(model, x, keep_BHW)
    for block in model.blocks:
        tokens = _dense_block(block, tokens, keep)
    return _pool(model, tokens, keep)


def logits_without_background(model: VisionTransformer, x: Tensor, keep_BHW: Tensor) -> Tensor:
    """Background tokens are dropped after the position embedding; one image at a time, no mask anywhere."""
    tokens, keep = _dense_tokens(model, x, keep_BHW)
    logits = []
    for b in range(len(x)):
        kept = tokens[b : b + 1, keep[b]]
        everything = torch.ones(1, kept.shape[1], dtype=torch.bool)
        for block in model.blocks:
            kept = _dense_block(block, kept, everything)
        logits.append(_pool(model, kept, everything))
    return torch.cat(logits)


def _dense_tokens(model: VisionTransformer, x: Tensor, keep_BHW: Tensor) -> tuple[Tensor, Tensor]:
    grid = model.patch_embed.proj(x)
    prefix, positions = model._positions((grid.shape[2], grid.shape[3]))
    patches = grid.flatten(2).transpose(1, 2) + positions
    B, P = len(x), model.num_prefix_tokens
    tokens = torch.cat([prefix.expand(B, P, patches.shape[-1]), patches], dim=1) if P else patches
    return tokens, torch.cat([torch.ones(B, P, dtype=torch.bool), keep_BHW.flatten(1)], dim=1)


def _dense_block(block: Block, x: Tensor, keep: Tensor) -> Tensor:
    B, N, C = x.shape
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(x)).view(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) / (C // heads) ** 0.5
    scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
    # A row without keys (no prefix token, no tissue) is 0 in the package's contract.
    weights = torch.where(keep.any(dim=1)[:, None, None, None], scores, 0.0).softmax(-1)
    weights = weights.masked_fill(~keep[:, None, None, :], 0)
    x = x + block.ls1(block.attn.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))
    return x + block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))


def _pool(model: VisionTransformer, tokens: Tensor, keep: Tensor) -> Tensor:
    tokens = model.norm(tokens)
    if model.global_pool == "token":
        return model.head(model.fc_norm(tokens[:, 0]))
    grid = keep[:, model.num_prefix_tokens :, None].to(tokens.dtype)
    pooled = (tokens[:, model.num_prefix_tokens :] * grid).sum(1) / grid.sum(1).clamp(min=1)
    return model.head(model.fc_norm(pooled))
