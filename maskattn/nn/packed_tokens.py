"""The packed tokens that a model passes from block to block.

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens
(prefix tokens included), C channels, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskattn.packing import Packing
from maskattn.shapes import Float

__all__ = ["PackedTokens", "insert_prefix", "rows_and_columns"]


@dataclass(frozen=True)
class PackedTokens:
    """The packed tokens of a batch, with their positions.

    Attributes:
        rows_TC: (T, C), the features of prefix and kept grid tokens, sequence after sequence.
        packing: the positions of the rows in (B, P + N).
        grid_HW: the rows and columns of the token grid.
        num_prefix: P.
        coords_T2: (T, 2), the tokens' row and column for 2-D ALiBi, NaN for prefix tokens; None without ALiBi.
        rotation: the cosines and sines (T, D/2) of rotary positions, 1 and 0 for prefix tokens; None without them.
    """

    rows_TC: Float[Tensor, "T C"]
    packing: Packing
    grid_HW: tuple[int, int]
    num_prefix: int
    coords_T2: Float[Tensor, "T 2"] | None = None
    rotation: tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]] | None = None

    def with_rows(self, rows_TC: Float[Tensor, "T C2"]) -> PackedTokens:
        """Return the same tokens with other features."""
        return PackedTokens(rows_TC, self.packing, self.grid_HW, self.num_prefix, self.coords_T2, self.rotation)

    def first(self) -> Float[Tensor, "B 1 C"]:
        """Return the first token of each sequence: the class token, if there is one."""
        return self.rows_TC[self.packing.cu_seqlens[:-1].long()][:, None]

    def grid_rows(self) -> tuple[Tensor, Packing]:
        """Return the grid tokens alone and their packing in (B, N), without synchronising with the device."""
        B, P = self.packing.batch_size, self.num_prefix
        if P == 0:
            return self.rows_TC, self.packing
        starts = self.packing.cu_seqlens - P * torch.arange(B + 1, device=self.rows_TC.device, dtype=torch.int32)
        total = self.packing.total - B * P
        # Grid row t is row t + P·(sequence + 1) of all rows; searchsorted counts the sequences that start before it.
        t = torch.arange(total, device=self.rows_TC.device)
        sequence = torch.searchsorted(starts[1:].long(), t, right=True)
        rows = t + P * (sequence + 1)
        indices = self.packing.indices.index_select(0, rows) - P * (sequence + 1)
        packing = Packing(indices, starts, max(self.packing.max_seqlen - P, 0), B, self.packing.num_tokens - P)
        return self.rows_TC.index_select(0, rows), packing


def rows_and_columns(packing: Packing, grid_HW: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return row and column, (T,) int64 each, of every packed token of grids without prefix tokens."""
    position = packing.indices % packing.num_tokens
    return torch.div(position, grid_HW[1], rounding_mode="floor"), position % grid_HW[1]


def insert_prefix(packing: Packing, P: int) -> tuple[Packing, Tensor, Tensor]:
    """Add P prefix tokens, always kept, before each sequence's N grid tokens, without synchronising with the device.

    Returns:
        The packing in (B, P + N), and its rows of prefix tokens (B·P,) and of grid tokens (T,).
    """
    B, N, device = packing.batch_size, packing.num_tokens, packing.indices.device
    sequence = packing.sequence_of_token
    starts = packing.cu_seqlens + P * torch.arange(B + 1, device=device, dtype=torch.int32)
    rows_of_prefix = (starts[:-1, None] + torch.arange(P, device=device)).flatten()
    rows_of_grid = torch.arange(packing.total, device=device) + P * (sequence + 1)
    indices = packing.indices.new_empty(packing.total + B * P)
    indices[rows_of_grid] = packing.indices + P * (sequence + 1)
    indices[rows_of_prefix] = (
        torch.arange(B, device=device)[:, None] * (P + N) + torch.arange(P, device=device)
    ).flatten()
    return Packing(indices, starts, packing.max_seqlen + P, B, P + N), rows_of_prefix, rows_of_grid
