"""Small random models and batches that the explanations are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.nn import VisionTransformer


def random_vit(**arguments: object) -> VisionTransformer:
    """A float64 model of two blocks for 64 px images, 4 × 4 tokens, with weights large enough to matter."""
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
    model = VisionTransformer(**{**small, **arguments}).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def sample(B: int = 2) -> tuple[Tensor, Tensor]:
    """(B, 3, 64, 64) float64 images and (B, 4, 4) bool."""
    keep = torch.rand(B, 4, 4) > 0.4
    keep[:, 0, 0] = True
    return torch.randn(B, 3, 64, 64, dtype=torch.float64), keep
