"""Masks that leave out random tokens, as in masked image modelling and token dropping.

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
    """Leave out a random share of each image's kept tokens, without synchronising with the device.

    Args:
        keep: (B, N) or (B, H, W) bool, True = the token takes part.
        share: the share of each image's kept tokens to leave out, in [0, 1); their number is rounded down, so that an
            image with tissue keeps at least one token.
        generator: a random generator on keep's device; None takes torch's default.

    Returns:
        A mask of keep's shape. The tokens that it leaves out, ``keep & ~result``, are those to predict.

    Raises:
        TypeError, ValueError: keep is not boolean, or the share is outside [0, 1).

    Example:
        >>> keep = torch.ones(2, 14, 14, dtype=torch.bool)
        >>> drop_random_tokens(keep, 0.75).sum(dim=(1, 2))
        tensor([49, 49])
    """
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool mask (True = the token takes part), got keep.dtype={keep.dtype}")
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got share={share}; 1 would leave no token")
    flat_BN = keep.flatten(1)
    noise_BN = torch.rand(flat_BN.shape, generator=generator, device=keep.device)
    # The kept tokens rank first, in random order; those with the lowest ranks stay.
    rank_BN = noise_BN.masked_fill(~flat_BN, 2.0).argsort(dim=1).argsort(dim=1)
    counts_B1 = flat_BN.sum(dim=1, keepdim=True)
    staying_B1 = counts_B1 - (counts_B1 * share).floor().long()
    return (flat_BN & (rank_BN < staying_B1)).view_as(keep)
