"""Augmentation of training images: rotation by quarter turns, mirroring, and random dropping of tokens."""

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
    """Augment an image and its mask of tokens.

    Args:
        pixels_3XY: (3, X, Y) uint8, the image.
        keep_HW: (h, w) bool, the tokens that take part; None keeps all.
        side: number of tokens along a side of the image.
        drop: share of the kept tokens that is dropped.
        rng: the only source of random numbers.

    Returns:
        The image, and its mask; None if all tokens take part.
    """
    if keep_HW is None and drop:
        keep_HW = torch.ones(side, side, dtype=torch.bool)
    quarters, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    pixels_3XY = _rotated(pixels_3XY, quarters, mirrored)
    keep_HW = None if keep_HW is None else _rotated(keep_HW, quarters, mirrored)
    if keep_HW is not None and drop:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        keep_HW = drop_random_tokens(keep_HW[None], drop, generator)[0]
    return pixels_3XY.contiguous(), keep_HW


def _rotated(image: Tensor, quarters: int, mirrored: bool) -> Tensor:
    rotated = torch.rot90(image, quarters, (-2, -1))
    return rotated.flip(-1) if mirrored else rotated
