"""A small slide, its division among processes, and what a slide head finds on it: in one process, or in several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskattn.distributed import average_gradients
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn import TileGrid, VisionTransformer, ViTHead
from maskattn.nn.slide_models.gigapath import GigaPathHead
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.ordinal import OrdinalHead

CHANNELS, GRID_HW = 12, (9, 8)
# The share of the tiles in each process: even, unequal, and with a process that has none, the first among them.
DIVISIONS = {2: ((0.5, 0.5), (0.9, 0.1), (0.0, 1.0)), 3: ((0.2, 0.7, 0.1), (0.0, 1.0, 0.0))}


def slide(dtype: torch.dtype = torch.float64, tiles: int = 37, seed: int = 2) -> tuple[Tensor, TileGrid]:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(GRID_HW[0] * GRID_HW[1], generator=generator)[:tiles]
    embeddings = torch.randn(tiles, CHANNELS, generator=generator, dtype=torch.float64).to(dtype)
    return embeddings, TileGrid(cells // GRID_HW[1], cells % GRID_HW[1], GRID_HW)


def rows_of(shares: tuple[float, ...], rank: int, tiles: int) -> slice:
    ends = [round(tiles * sum(shares[: i + 1])) for i in range(len(shares))]
    return slice(0 if rank == 0 else ends[rank - 1], ends[rank])


def part_of(grid: TileGrid, rows: slice, group: Any) -> TileGrid:
    return TileGrid(grid.rows_T[rows], grid.columns_T[rows], grid.shape_HW, group)


HEADS = ("token", "token_avg", "avg", "map", "alibi", "rotary", "learn", "gigapath", "gigapath_mean", "ordinal")


def head_named(name: str, dtype: torch.dtype = torch.float64, **arguments: Any) -> SlideHead:
    """A head with seeded weights, none of them 0."""
    pool = name if name in ("token_avg", "avg", "map") else "avg" if name == "gigapath_mean" else "token"
    positions = name if name in ("alibi", "rotary", "learn") else "sine" if "gigapath" in name else "none"
    classes = 0 if "gigapath" in name else 3
    vit = VisionTransformer(
        img_size=GRID_HW,  # no resampling, which torch computes in float32
        patch_size=1,
        in_chans=CHANNELS,
        num_classes=classes,
        embed_dim=32,
        depth=2,
        num_heads=2,
        reg_tokens=2 if name == "rotary" else 0,
        global_pool=pool,
        pos_embed=positions,
        **arguments,
    )
    head: SlideHead
    if "gigapath" in name:
        head = GigaPathHead(vit, 3, (1, 2))
    else:
        head = OrdinalHead(ViTHead(vit)) if name == "ordinal" else ViTHead(vit)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for x in head.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * (0.3 if x.ndim > 1 else 0.2) + (x.ndim == 1) * 0.5)
    return head.to(dtype).eval()


def trained_step(head: SlideHead, embeddings: Tensor, grid: TileGrid) -> dict[str, Tensor]:
    """Logits, and the gradients of all weights and of this process's embeddings, as one process finds them."""
    leaf = embeddings.clone().requires_grad_()
    head.zero_grad()
    logits = head(leaf, grid=grid)
    (logits * (torch.arange(len(logits)) - 1.3)).sum().backward()
    found = {"logits": logits.detach()}
    processes = 1
    if grid.group is not None:
        average_gradients(head.parameters(), grid.group)
        processes = grid.group.size()
    assert leaf.grad is not None
    found["embeddings"] = leaf.grad / processes
    return found | {name: x.grad.clone() for name, x in head.named_parameters() if x.grad is not None}


def explained(head: SlideHead, embeddings: Tensor, grid: TileGrid, method: str) -> dict[str, Tensor]:
    found = SlideHeadCDAM(head, method=method, **({} if method == "cdam" else {"m": 4})).tiles(embeddings, grid=grid)
    assert found.gradient_KTC is not None
    results = {
        "logits": found.logits_K,
        "relevance": found.relevance_KT.T,
        "attention": found.attention_T,
        "gradient": found.gradient_KTC.transpose(0, 1),
    }
    if found.sums is not None:
        results |= {"difference": found.sums.difference_K, "prefix": found.sums.prefix_K, "gap": found.sums.gap_K}
    if found.path is not None:
        results["path gap"] = found.path.gap_K
    return results


OF_TILES = ("embeddings", "relevance", "attention", "gradient")
