"""Packing: from a ``keep`` mask to the rows of the tokens that take part, and back.

A batch of B sequences of N tokens is *packed* by laying the kept tokens of all sequences end to end as T rows. The
spelling of ``cu_seqlens`` and ``max_seqlen`` is the flash-attention family's.

Dimension key: B sequences, N tokens of each, T packed tokens, C whatever follows (channels, or heads and width).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskattn.shapes import Bool, Int, Shaped

__all__ = ["Packing", "pack", "unpack"]


@dataclass(frozen=True)
class Packing:
    """Where the kept tokens of a batch lie.

    Attributes:
        indices: (T,) int64, the row of each kept token in the batch flattened to (B·N, ...), ascending.
        cu_seqlens: (B + 1,) int32, where each sequence starts among the T rows; the last entry is T.
        max_seqlen: the longest sequence, in tokens.
        batch_size: B.
        num_tokens: N, tokens of each sequence before packing.
    """

    indices: Int[Tensor, "T"]
    cu_seqlens: Int[Tensor, "B_plus_1"]
    max_seqlen: int
    batch_size: int
    num_tokens: int

    @classmethod
    def from_keep(cls, keep_BN: Bool[Tensor, "B N"]) -> Packing:
        """Read a mask of kept tokens.

        On a CUDA mask this waits for the device twice (the number of kept tokens, the longest sequence); a mask born
        on the CPU can be packed there and moved with :meth:`to` without a wait.

        Args:
            keep_BN: (B, N) bool, True = the token takes part.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: the mask has not two dimensions.
        """
        _check_keep(keep_BN)
        lengths = keep_BN.sum(dim=1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(
            indices=keep_BN.reshape(-1).nonzero(as_tuple=True)[0],
            cu_seqlens=cu_seqlens,
            max_seqlen=int(lengths.max()) if lengths.numel() else 0,
            batch_size=keep_BN.shape[0],
            num_tokens=keep_BN.shape[1],
        )

    @property
    def total(self) -> int:
        """T, the number of kept tokens of the batch."""
        return self.indices.shape[0]

    @property
    def sequence_of_token(self) -> Int[Tensor, "T"]:
        """(T,) int64, the sequence to which each packed row belongs; no wait for the device."""
        return torch.div(self.indices, self.num_tokens, rounding_mode="floor")

    def to(self, device: torch.device | str) -> Packing:
        """The same packing with its tensors on another device."""
        return Packing(
            self.indices.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.batch_size,
            self.num_tokens,
        )


def pack(x: Shaped[Tensor, "B N *rest"], packing: Packing) -> Shaped[Tensor, "T *rest"]:
    """Gather the kept tokens of a batch into T rows: (B, N, ...) → (T, ...).

    Rows that are not kept are never read, and their gradient is 0.

    Raises:
        ValueError: ``x`` is not a (B, N, ...) batch of the shape that was packed.
    """
    if tuple(x.shape[:2]) != (packing.batch_size, packing.num_tokens):
        raise ValueError(
            f"pack needs x of shape (B, N, ...) = ({packing.batch_size}, {packing.num_tokens}, ...) as the packing "
            f"was made for, got x.shape={tuple(x.shape)}; build the Packing from this batch's own keep mask"
        )
    return x.flatten(0, 1).index_select(0, packing.indices)


def unpack(rows: Shaped[Tensor, "T *rest"], packing: Packing) -> Shaped[Tensor, "B N *rest"]:
    """Scatter T packed rows to their places in the batch: (T, ...) → (B, N, ...); every other row is 0.

    Raises:
        ValueError: ``rows`` has not one row for each kept token.
    """
    if rows.shape[0] != packing.total:
        raise ValueError(
            f"unpack needs one row for each of the T={packing.total} kept tokens, got rows.shape={tuple(rows.shape)}; "
            "use the Packing that packed them"
        )
    dense = rows.new_zeros((packing.batch_size * packing.num_tokens, *rows.shape[1:]))
    return dense.index_copy(0, packing.indices, rows).unflatten(0, (packing.batch_size, packing.num_tokens))


def _check_keep(keep_BN: Tensor) -> None:
    if keep_BN.dtype != torch.bool:
        raise TypeError(
            f"keep must be a bool mask (True = the token takes part), got keep.dtype={keep_BN.dtype}; "
            "compare it with its threshold first, e.g. keep = fraction > 0"
        )
    if keep_BN.ndim != 2:
        raise ValueError(f"keep must have shape (B, N), got keep.shape={tuple(keep_BN.shape)}; flatten the grid first")
