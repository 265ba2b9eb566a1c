"""The positions of each sequence's rows, in the single form that the kernels read.

Dimension key: B sequences, N tokens, T packed tokens, H heads, D head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskattn.derived import derived
from maskattn.kernels.launch.recording import note_constant
from maskattn.operands import Sequences
from maskattn.shapes import Bool, Int

__all__ = [
    "MAX_BLOCK",
    "Rows",
    "bias_strides_bht",
    "every_row",
    "kept_rows",
    "lse_strides_bh",
    "packed_rows",
    "packed_rows_of",
    "readable",
    "strides_bht",
    "whole_rows",
]

# Rows of the largest tile of any configuration.
MAX_BLOCK = 128


@dataclass(frozen=True)
class Rows:
    """The rows of the queries or of the keys: sequence b has the positions starts[b] to ends[b].

    Attributes:
        starts: (B,) int32, or (B + 1,) for packed sequences, whose last entry is not read.
        ends: (B,) int32.
        index: (B·N,) int32, the row of each position within its sequence, or None if the position is the row.
        longest: an upper bound of the sequences' lengths, known without synchronising with the device.
        total: number of positions of all sequences, or None if the host does not know it.
        cu_seqlens: for packed sequences, the caller's tensor.
        mask: for the tokens of a mask, a reference to the caller's tensor, with which the rows themselves are cached.
    """

    starts: Int[Tensor, "B"]
    ends: Int[Tensor, "B"]
    index: Int[Tensor, "BN"] | None
    longest: int
    total: int | None = None
    cu_seqlens: Int[Tensor, "B_plus_1"] | None = None
    mask: weakref.ref[Tensor] | None = None

    @property
    def source(self) -> Tensor | None:
        """The caller's tensor that determines the rows, with which values derived from them can be cached."""
        return self.cu_seqlens if self.mask is None else self.mask()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors among the kernels' arguments."""
        return self.starts, self.ends, self.index

    @property
    def batch(self) -> int:
        """B."""
        return self.ends.shape[0]

    @property
    def all_equal(self) -> bool:
        """Whether the host knows that all sequences are as long as the longest."""
        return self.total == self.longest * self.batch


def packed_rows(cu_seqlens: Int[Tensor, "B_plus_1"], max_seqlen: int, total: int | None = None) -> Rows:
    """Return the rows of packed sequences."""
    longest = max_seqlen if total is None else min(max_seqlen, total)
    return Rows(cu_seqlens, cu_seqlens[1:], None, longest, total, cu_seqlens)


def packed_rows_of(sequences: Sequences, q: Tensor, k: Tensor) -> tuple[Rows, Rows]:
    """Return the rows of the packed queries (Tq, H, D) and keys (Tk, H, D)."""
    of_queries = sequences.cu_seqlens_q, sequences.max_seqlen_q, q.shape[0]
    of_keys = sequences.cu_seqlens_k, sequences.max_seqlen_k, k.shape[0]
    rows = packed_rows(*of_queries)
    same = of_keys[0] is of_queries[0] and of_keys[1:] == of_queries[1:]
    return rows, rows if same else packed_rows(*of_keys)


def kept_rows(keep_BN: Bool[Tensor, "B N"]) -> Rows:
    """Return the rows of the kept tokens of a dense batch, without synchronising with the device.

    They are cached with the mask, for all layers and for backward.
    """
    return _cached(keep_BN, "kept rows", lambda: _kept_rows(keep_BN))


def every_row(keep_BN: Bool[Tensor, "B N"], tokens: int) -> Rows:
    """Return all rows of a dense batch of ``tokens`` queries for each sequence of the mask, also cached with it."""
    return _cached(keep_BN, ("every row", tokens), lambda: whole_rows(keep_BN.shape[0], tokens, keep_BN.device))


def _cached(keep_BN: Tensor, name: Hashable, make: Callable[[], Rows]) -> Rows:
    kept = derived(keep_BN)
    if kept is None:
        return make()
    # Another stream would not wait for the kernels that compute them.
    key = name, torch.cuda.current_stream(keep_BN.device).cuda_stream if keep_BN.is_cuda else 0
    if key not in kept:
        kept[key] = replace(make(), mask=weakref.ref(keep_BN))
    rows: Rows = kept[key]
    for x in rows.tensors:
        if x is not None:
            note_constant(x)
    return rows


def _kept_rows(keep_BN: Tensor) -> Rows:
    batch, tokens = keep_BN.shape
    starts = torch.arange(batch, dtype=torch.int32, device=keep_BN.device) * tokens
    # The kept tokens come first, then the others, both in their original order.
    earlier_BN, lengths = keep_BN.cumsum(dim=1), keep_BN.sum(dim=1, dtype=torch.int32)
    token = torch.arange(tokens, device=keep_BN.device)
    position_BN = torch.where(keep_BN, earlier_BN - 1, lengths[:, None] + token - earlier_BN)
    index_BN = torch.empty(batch, tokens, dtype=torch.int32, device=keep_BN.device)
    index_BN.scatter_(1, position_BN, token.to(torch.int32).expand(batch, tokens))
    return Rows(starts, starts + lengths, index_BN.reshape(-1), tokens)


def whole_rows(batch: int, tokens: int, device: torch.device) -> Rows:
    """Return all rows of a dense batch."""
    starts = torch.zeros(batch, dtype=torch.int32, device=device)
    return Rows(starts, starts + tokens, None, tokens, batch * tokens)


def strides_bht(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of sequence, head and token of a packed (T, H, D) or a dense (B, H, N, D) tensor."""
    if x.ndim == 3:
        return 0, x.stride(1), x.stride(0)
    return x.stride(0), x.stride(1), x.stride(2)


def bias_strides_bht(key_bias: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """Return the strides of sequence, head and token of a key bias, 0 for a shared axis.

    The bias is (Tk,) or (Tk, H) for packed tensors, (B, N) or (B, H, N) for dense ones.
    """
    if key_bias is None:
        return 0, 0, 0
    if packed:
        return 0, key_bias.stride(1) if key_bias.ndim == 2 else 0, key_bias.stride(0)
    if key_bias.ndim == 2:
        return key_bias.stride(0), 0, key_bias.stride(1)
    return key_bias.stride(0), key_bias.stride(1), key_bias.stride(2)


def lse_strides_bh(lse: Tensor) -> tuple[int, int]:
    """Return the strides of sequence and head of a contiguous (H, Tq) or (B, H, Nq) tensor."""
    return (0, lse.stride(0)) if lse.ndim == 2 else (lse.stride(0), lse.stride(1))


def readable(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if its rows are not contiguous or so far apart that a tile's offsets exceed 32 bits."""
    near = strides_bht(x)[2] * MAX_BLOCK < 2**31
    return x if x.stride(-1) == 1 and near else x.contiguous()
