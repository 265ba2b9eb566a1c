"""Packed queries, keys and values for an attention operation, with their packings.

Dimension key: B sequences, L queries and S keys of each, M rows of the longest sequence, Tq and Tk packed queries and
keys, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskattn.packing import Packing, pack, unpack
from maskattn.shapes import Float

__all__ = ["Operands", "is_full", "left_aligned", "rows_of", "scatter_rows"]


@dataclass(frozen=True)
class Operands:
    """The inputs of an attention operation.

    Attributes:
        q: (Tq, H, D), the queries.
        k, v: (Tk, H, D), the keys and values.
        queries, keys: the packings of their rows in (B, L) and (B, S).
        key_bias: (Tk,), added to the scores of each key, or None.
    """

    q: Float[Tensor, "Tq H D"]
    k: Float[Tensor, "Tk H D"]
    v: Float[Tensor, "Tk H D"]
    queries: Packing
    keys: Packing
    key_bias: Float[Tensor, "Tk"] | None

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens and max_seqlen of queries and keys, in the order of ``packed_attention``'s arguments."""
        return self.queries.cu_seqlens, self.keys.cu_seqlens, self.queries.max_seqlen, self.keys.max_seqlen

    def with_keys_appended(self, more_k: Float[Tensor, "n H D"], more_v: Float[Tensor, "n H D"]) -> Operands:
        """Return the operands with n more keys, without bias, at the end of every sequence."""
        count, keys, device = more_k.shape[0], self.keys, self.k.device
        B, S = keys.batch_size, keys.num_tokens + count
        ends = torch.arange(B, device=device)[:, None] * S + torch.arange(keys.num_tokens, S, device=device)
        indices, order = torch.cat([keys.indices + count * keys.sequence_of_token, ends.flatten()]).sort()
        shift = count * torch.arange(B + 1, dtype=torch.int32, device=device)
        bias = self.key_bias

        def append(rows: Tensor, more: Tensor) -> Tensor:
            return torch.cat([rows, more.to(rows.dtype).repeat(B, *([1] * (rows.ndim - 1)))])[order]

        return replace(
            self,
            k=append(self.k, more_k),
            v=append(self.v, more_v),
            keys=Packing(indices, keys.cu_seqlens + shift, keys.max_seqlen + count, B, S),
            key_bias=None if bias is None else append(bias, bias.new_zeros(count)),
        )


def is_full(packing: Packing) -> bool:
    """Return whether every token takes part."""
    return packing.total == packing.batch_size * packing.num_tokens


def rows_of(x: Tensor, packing: Packing) -> Tensor:
    """Pack (B, N, ...) into (T, ...), without a copy if every token takes part."""
    return x.flatten(0, 1) if is_full(packing) else pack(x, packing)


def scatter_rows(rows: Tensor, packing: Packing) -> Tensor:
    """Unpack (T, ...) into (B, N, ...), 0 at other tokens; without a copy if every token takes part."""
    if is_full(packing):
        return rows.unflatten(0, (packing.batch_size, packing.num_tokens))
    return unpack(rows, packing)


def left_aligned(packing: Packing) -> Packing:
    """Return the packing of the same rows with each sequence moved to the front of (B, M); without rows, M is 1."""
    if is_full(packing) and packing.num_tokens:
        return packing
    sequence = packing.sequence_of_token
    position = torch.arange(packing.total, device=sequence.device) - packing.cu_seqlens[sequence]
    M = max(packing.max_seqlen, 1)
    return Packing(sequence * M + position, packing.cu_seqlens, packing.max_seqlen, packing.batch_size, M)
