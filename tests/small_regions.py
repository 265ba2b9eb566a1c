"""Regions of patches of 32 px, 2 × 2 tokens each, for tests of models of three levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE = 2  # tokens of 16 px along a patch of 32 px


def with_random_weights(model: nn.Module) -> nn.Module:
    """In eval mode, with weights large enough to matter."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def some_regions(columns: int, background: float) -> tuple[Tensor, Tensor]:
    """Four regions of 3 × columns patches in float64, row-major on the slide, and their (4, h, w) bool keep.

    The third holds no tissue; none holds it everywhere.
    """
    keep = torch.rand(4, 3 * SIDE, columns * SIDE) > background
    keep[:, 0, 0] = True
    keep[:, 2:4, 2:4] = False
    keep[2] = False
    return torch.randn(4, 3, 96, 32 * columns, dtype=torch.float64), keep
