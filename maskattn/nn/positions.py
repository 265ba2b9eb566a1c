"""Position embeddings learnt on one grid, read on another.

Two conventions exist for weights in the wild, and they differ by more than rounding, so the caller names one:

- ``"timm"``: bicubic with antialiasing to the exact target size (timm's ``resample_abs_pos_embed``);
- ``"dino"``: bicubic without antialiasing, by a scale factor nudged by 0.1 token so that the size comes out right
  (DINO, DINOv2's first release and HIPT). The nudge shifts the sampling points, so it is part of the convention.

Dimension key: P prefix tokens, N tokens of the learnt grid, C channels, H and W of the target grid.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from maskattn.shapes import Float

__all__ = ["CONVENTIONS", "resample_position_embedding"]

CONVENTIONS = ("timm", "dino")


def resample_position_embedding(
    grid_1NC: Float[Tensor, "1 N C"], learnt_HW: tuple[int, int], target_HW: tuple[int, int], convention: str
) -> Float[Tensor, "1 M C"]:
    """Bicubic interpolation of a grid of position embeddings, (1, N, C) → (1, H·W, C).

    A grid of its own size is returned as it is, in both conventions.

    Args:
        grid_1NC: the embeddings of the grid tokens, without those of prefix tokens.
        learnt_HW: rows and columns of the learnt grid.
        target_HW: rows and columns wanted.
        convention: "timm" or "dino".
    """
    if learnt_HW == target_HW:
        return grid_1NC
    image = grid_1NC.float().unflatten(1, learnt_HW).permute(0, 3, 1, 2)  # [1, C, h, w]
    if convention == "timm":
        image = F.interpolate(image, size=target_HW, mode="bicubic", antialias=True)
    else:
        factors = [(target + 0.1) / learnt for target, learnt in zip(target_HW, learnt_HW, strict=True)]
        if [math.floor(f * n) for f, n in zip(factors, learnt_HW, strict=True)] != list(target_HW):
            raise ValueError(
                f"the DINO convention cannot reach a {target_HW} grid from {learnt_HW}; pass pos_embed_resample='timm'"
            )
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(grid_1NC.dtype)
