"""The packing of a mask of kept tokens, also for a mask that has no values yet.

The number of kept tokens is data: it is read from the mask or, in an exported program, is a size that is known when the
program runs.

Dimension key: B sequences, N tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.packing import Packing
from maskattn.shapes import Bool

__all__ = ["every_token", "keep_per_token", "packing_of"]


def keep_per_token(
    keep: Tensor | None, batch_size: int, grid_HW: tuple[int, int], device: torch.device
) -> Bool[Tensor, "B N"]:
    """Return a caller's ``keep``, (B, N), (B, H, W) or None for all, as (B, N) on ``device``.

    Raises:
        TypeError, ValueError: the mask is not boolean, or has another shape.
    """
    flat = (batch_size, grid_HW[0] * grid_HW[1])
    if keep is None:
        return torch.ones(flat, dtype=torch.bool, device=device)
    if keep.dtype != torch.bool:
        raise TypeError(
            f"keep must be a bool mask (True = the token takes part), got keep.dtype={keep.dtype}; "
            "compare it with its threshold first, e.g. keep = fraction > 0"
        )
    if tuple(keep.shape) not in (flat, (batch_size, *grid_HW)):
        raise ValueError(
            f"keep must have shape (B, N) = {flat} or (B, H, W) = {(batch_size, *grid_HW)} over grid tokens, prefix "
            f"tokens not counted, got keep.shape={tuple(keep.shape)}"
        )
    return keep.to(device).reshape(flat)


def packing_of(
    keep: Bool[Tensor, "..."] | None, batch_size: int, grid_HW: tuple[int, int], device: torch.device
) -> Packing:
    """Return the packing of a caller's ``keep``, which may have any form that :func:`keep_per_token` takes.

    On the meta device, where a mask has no values, every token counts as kept; outputs have the same shapes.

    Raises:
        TypeError, ValueError: the mask does not fit, or ``torch.jit.trace`` would freeze it.
    """
    if keep is None:
        return every_token(batch_size, grid_HW[0] * grid_HW[1], device)
    keep_BN = keep_per_token(keep, batch_size, grid_HW, device)
    if keep_BN.device.type == "meta":
        return every_token(keep_BN.shape[0], keep_BN.shape[1], keep_BN.device)
    return _symbolic(keep_BN) if torch.compiler.is_exporting() else Packing.from_keep(keep_BN)


def every_token(batch_size: int, num_tokens: int, device: torch.device) -> Packing:
    """Return the packing in which every token takes part, without synchronising with the device."""
    return Packing(
        torch.arange(batch_size * num_tokens, device=device),
        torch.arange(batch_size + 1, dtype=torch.int32, device=device) * num_tokens,
        num_tokens,
        batch_size,
        num_tokens,
    )


def _symbolic(keep_BN: Tensor) -> Packing:
    """Return the packing of a mask that is a program's input: no value is read, and N bounds the longest sequence."""
    kept = keep_BN.flatten()
    ends = keep_BN.sum(dim=1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packing(
        indices=kept.nonzero().squeeze(1),
        cu_seqlens=torch.nn.functional.pad(ends, (1, 0)),
        max_seqlen=keep_BN.shape[1],
        batch_size=keep_BN.shape[0],
        num_tokens=keep_BN.shape[1],
        row_of_token=(kept.cumsum(0, dtype=torch.int32) - 1).where(kept, -1),
    )
