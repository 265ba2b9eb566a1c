"""How a training image varies from epoch to epoch: it is turned and mirrored, and some of its tokens are left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskattn.nn.random_masks import drop_random_tokens
from maskattn.shapes import Bool, UInt8

__all__ = ["varied"]


def varied(
    pixels_3XY: UInt8[Tensor, "3 X Y"],
    keep_HW: Bool[Tensor, "h w"] | None,
    side: int,
    drop: float,
    rng: np.random.Generator,
) -> tuple[UInt8[Tensor, "3 X Y"], Bool[Tensor, "h w"] | None]:
    """An image and its tokens, varied.

    Args:
        pixels_3XY: the image.
        keep_HW: the tokens that take part; None = all.
        side: tokens along the image.
        drop: share of the kept tokens that is left out.
        rng: all that chance depends on.
    """
    if keep_HW is None and drop:
        keep_HW = torch.ones(side, side, dtype=torch.bool)
    quarter, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    pixels_3XY = _turned(pixels_3XY, quarter, mirrored)
    keep_HW = None if keep_HW is None else _turned(keep_HW, quarter, mirrored)
    if keep_HW is not None and drop:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        keep_HW = drop_random_tokens(keep_HW[None], drop, generator)[0]
    return pixels_3XY.contiguous(), keep_HW


def _turned(image: Tensor, quarter: int, mirrored: bool) -> Tensor:
    turned = torch.rot90(image, quarter, (-2, -1))
    return turned.flip(-1) if mirrored else turned
