"""Masks that leave tokens out at random, as masked-image modelling and token dropping do in training.

Dimension key: B images, N grid tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.shapes import Bool

__all__ = ["drop_random_tokens"]


def drop_random_tokens(
    keep: Bool[Tensor, "B *grid"], share: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "B *grid"]:
    """Leave out a share of each image's kept tokens, at random, without a wait for the device.

    Args:
        keep: (B, N) or (B, H, W) bool, True = the token takes part.
        share: of the kept tokens of each image that are left out, in [0, 1); the count left out is rounded down, so
            that an image with tissue keeps some.
        generator: on keep's device; None takes torch's own.

    Returns:
        A mask of keep's shape; what it leaves out of ``keep``, ``keep & ~result``, is what to predict.

    Raises:
        TypeError, ValueError: keep is not boolean, or the share lies outside [0, 1).

    Example:
        >>> keep = torch.ones(2, 14, 14, dtype=torch.bool)
        >>> drop_random_tokens(keep, 0.75).sum(dim=(1, 2))
        tensor([49, 49])
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool mask (True = the token takes part), got keep.dtype={keep.dtype}")
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got share={share}; with 1 no token would be left")
    flat_BN = keep.flatten(1)
    noise_BN = torch.rand(flat_BN.shape, generator=generator, device=keep.device)
    # Kept tokens come first, in random order; the first ones stay.
    rank_BN = noise_BN.masked_fill(~flat_BN, 2.0).argsort(dim=1).argsort(dim=1)
    counts_B1 = flat_BN.sum(dim=1, keepdim=True)
    staying_B1 = counts_B1 - (counts_B1 * share).floor().long()
    return (flat_BN & (rank_BN < staying_B1)).view_as(keep)
