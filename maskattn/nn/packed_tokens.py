"""The packed tokens that a model passes from block to block, and attention within their sequences.

The rows of a sequence may be divided among the processes of a group (:mod:`maskattn.distributed`). Prefix tokens are
then rows of process 0, and what is computed from all rows of a sequence (attention, a class token, a sum) is a message
between the processes: the methods of :class:`PackedTokens` know, and the layers that call them do not.

Dimension key: B images, N = H·W grid tokens of each, P prefix tokens (class token, registers), T packed tokens
(prefix tokens included), C channels, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn import distributed
from maskattn.attention import api
from maskattn.distributed import shared
from maskattn.distributed.agreement import agree
from maskattn.distributed.shards import Shards
from maskattn.distributed.transport import gather_alike
from maskattn.packing import Packing
from maskattn.shapes import Float

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        shards: the division of the sequences among the processes of a group, of which T, ``packing`` and all rows
            describe this process's chunks; None if this process has all rows.
    """

    rows_TC: Float[Tensor, "T C"]
    packing: Packing
    grid_HW: tuple[int, int]
    num_prefix: int
    coords_T2: Float[Tensor, "T 2"] | None = None
    rotation: tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]] | None = None
    shards: Shards | None = None

    @property
    def own_prefix(self) -> int:
        """The number of prefix tokens of each sequence among this process's rows: P, or 0 in other processes."""
        return self.num_prefix if self.shards is None or self.shards.rank == 0 else 0

    def with_rows(self, rows_TC: Float[Tensor, "T C2"]) -> PackedTokens:
        """Return the same tokens with other features."""
        return replace(self, rows_TC=rows_TC)

    def after_prefix(self, prefix_1PC: Float[Tensor, "1 P C"], group: ProcessGroup | None) -> PackedTokens:
        """Return these grid tokens after P prefix tokens, which are rows of process 0 if there is a group."""
        B, P = self.packing.batch_size, prefix_1PC.shape[1]
        present = group is None or group.rank() == 0
        packing, rows_of_prefix, rows_of_grid = insert_prefix(self.packing, P, present=present)
        prefix = prefix_1PC.to(self.rows_TC.dtype).expand(B, P, -1).flatten(0, 1)
        if not present:
            prefix = prefix[:0]  # still part of the graph, with a gradient of 0
        rows = self.rows_TC.new_empty((packing.total, self.rows_TC.shape[1]))
        rows_TC = rows.index_copy(0, rows_of_grid, self.rows_TC).index_copy(0, rows_of_prefix, prefix)
        coords_T2, rotation = self.coords_T2, self.rotation
        if coords_T2 is not None:
            coords_T2 = coords_T2.new_full((packing.total, 2), torch.nan).index_copy(0, rows_of_grid, coords_T2)
        if rotation is not None:
            shape = (packing.total, rotation[0].shape[1])
            cos, sin = rotation[0].new_ones(shape), rotation[1].new_zeros(shape)
            rotation = cos.index_copy(0, rows_of_grid, rotation[0]), sin.index_copy(0, rows_of_grid, rotation[1])
        return PackedTokens(rows_TC, packing, self.grid_HW, P, coords_T2, rotation)

    def divided(self, group: ProcessGroup) -> PackedTokens:
        """Return these tokens as this process's rows of sequences that are divided among the processes of a group.

        Raises:
            GroupError: the processes have different grids, or numbers of prefix tokens or sequences.
            ValueError: a sequence has no grid token in any process, or two processes have one in the same position.
        """
        return replace(self, shards=_shards_of(self.packing, self.grid_HW, self.num_prefix, group))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Float[Tensor, "T H D"]:
        """Attend within each sequence: ``packed_attention`` of queries, keys and values of these tokens."""
        packing = self.packing
        if self.shards is not None:
            return distributed.packed_attention(q, k, v, self.shards, **options)  # type: ignore[return-value]  # no lse
        lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        return api.packed_attention(q, k, v, *lengths, **options)  # type: ignore[return-value]  # no lse

    def read(self, q_BRHD: Float[Tensor, "B R H D"], k: Tensor, v: Tensor, **options: Any) -> Any:
        """Attend from a few queries of each sequence to keys and values of these tokens: ``readout``."""
        if self.shards is not None:
            return distributed.readout(q_BRHD, k, v, self.shards, **options)
        return api.readout(q_BRHD, k, v, self.packing.cu_seqlens, self.packing.max_seqlen, **options)

    def relevance(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, **options: Any
    ) -> Float[Tensor, "K T"]:
        """Compute ``token_relevance`` of these tokens for a :meth:`read` and the gradients at its output."""
        if self.shards is not None:
            return distributed.token_relevance(q, k, v, out, lse, grad_out, self.shards, **options)
        lengths = self.packing.cu_seqlens, self.packing.max_seqlen
        return api.token_relevance(q, k, v, out, lse, grad_out, *lengths, **options)

    def of_all(self, sums: Tensor) -> Tensor:
        """Return the sum of what all processes have summed over their rows."""
        return sums if self.shards is None else shared.summed(sums, self.shards)

    def mean_of_all(self, x: Tensor) -> Tensor:
        """Return the mean of all processes' tensors: the sum of gradients of a result that all processes hold."""
        return x if self.shards is None else shared.summed(x, self.shards) / self.shards.size

    def counted_once(self, shared_by_all: Tensor) -> Tensor:
        """Return a result that all processes hold, so that its gradients are those of one process."""
        return shared_by_all if self.shards is None else shared.counted_once(shared_by_all, self.shards.group)

    def first(self) -> Float[Tensor, "B 1 C"]:
        """Return the first token of each sequence: the class token, if there is one."""
        if self.shards is not None:
            return shared.first_rows(self.rows_TC, self.shards)[:, None]
        return self.rows_TC[self.packing.cu_seqlens[:-1].long()][:, None]

    def grid(self) -> PackedTokens:
        """Return the grid tokens alone, without positions."""
        rows_TC, packing = self.grid_rows()
        shards = None if self.shards is None else self.shards.without_first(self.num_prefix)
        return PackedTokens(rows_TC, packing, self.grid_HW, 0, shards=shards)

    def grid_rows(self) -> tuple[Tensor, Packing]:
        """Return the grid tokens alone and their packing in (B, N), without synchronising with the device."""
        B, P = self.packing.batch_size, self.own_prefix
        if self.num_prefix > P:
            N = self.packing.num_tokens - self.num_prefix
            indices = self.packing.indices - self.num_prefix * (self.packing.sequence_of_token + 1)
            return self.rows_TC, Packing(indices, self.packing.cu_seqlens, self.packing.max_seqlen, B, N)
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


def insert_prefix(packing: Packing, P: int, *, present: bool = True) -> tuple[Packing, Tensor, Tensor]:
    """Add P prefix tokens, always kept, before each sequence's N grid tokens, without synchronising with the device.

    Args:
        packing: the packing of the grid tokens in (B, N).
        P: the number of prefix tokens.
        present: whether their rows are this process's; otherwise they only have positions.

    Returns:
        The packing in (B, P + N), and its rows of prefix tokens (B·P,) and of grid tokens (T,).
    """
    B, N, device = packing.batch_size, packing.num_tokens, packing.indices.device
    sequence = packing.sequence_of_token
    if not present:
        moved = Packing(packing.indices + P * (sequence + 1), packing.cu_seqlens, packing.max_seqlen, B, P + N)
        return moved, sequence.new_empty(0), torch.arange(packing.total, device=device)
    starts = packing.cu_seqlens + P * torch.arange(B + 1, device=device, dtype=torch.int32)
    rows_of_prefix = (starts[:-1, None] + torch.arange(P, device=device)).flatten()
    rows_of_grid = torch.arange(packing.total, device=device) + P * (sequence + 1)
    indices = packing.indices.new_empty(packing.total + B * P)
    indices[rows_of_grid] = packing.indices + P * (sequence + 1)
    indices[rows_of_prefix] = (
        torch.arange(B, device=device)[:, None] * (P + N) + torch.arange(P, device=device)
    ).flatten()
    return Packing(indices, starts, packing.max_seqlen + P, B, P + N), rows_of_prefix, rows_of_grid


def _shards_of(packing: Packing, grid_HW: tuple[int, int], num_prefix: int, group: ProcessGroup) -> Shards:
    """Exchange how many rows of each sequence every process holds, and check that they fit together."""
    described = {"grid": grid_HW, "number of prefix tokens": num_prefix}
    agree("a model over divided tokens", described, None, group, packing.indices.device)
    shards = Shards.of(packing, group)
    if shards.total and min(shards.total) <= num_prefix:
        raise ValueError(
            f"a slide must have at least one tile in all processes together, got {min(shards.total) - num_prefix}; "
            "leave out slides without tissue"
        )
    longest = max(map(sum, shards.lengths))
    positions = torch.cat(gather_alike(F.pad(packing.indices, (0, longest - packing.total), value=-1), group))
    positions = positions[positions >= 0]
    if repeated := len(positions) - len(positions.unique()):
        raise ValueError(
            f"every tile of a divided slide must be in one process, got {repeated} cells in several; pass each process "
            "only its own tiles"
        )
    return shards
