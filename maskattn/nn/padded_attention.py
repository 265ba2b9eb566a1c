"""Attention with a dense mask, or with its weights, which the fused operations do not support.

The kept keys of each sequence are moved to its front and padded to the longest sequence, M; keys that the padding mask
leaves out are never read. Attention is then torch's ``scaled_dot_product_attention`` or, if the weights are wanted,
computed in blocks of queries:

    P = softmax(s·QKᵀ + added)      out = dropout(P) V      the weights are dropout(P), as torch's layer has them

Dimension key: B sequences, L queries and S keys of each, Lm queries and M keys of the longest sequence after packing,
Tq packed queries, H heads (h is 1 or H, b is 1 or B), D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskattn.nn.operands import Operands, is_full, left_aligned, rows_of, scatter_rows
from maskattn.packing import Packing
from maskattn.shapes import Float

__all__ = ["attend_causally", "attend_under_mask", "attend_with_weights", "dropout_is_torchs"]

_SCORES_IN_CACHE = 1 << 20  # the block on a CPU: 4 MiB of float32, which fit in the cache
_SCORES_IN_MEMORY = 1 << 26  # the block on other devices: 256 MiB, enough work for each launch
_SCORES_HELD = 1 << 24  # up to this number of scores, backward keeps them instead of computing them again
_SCORES_DROPPED = 1 << 26  # up to this number of scores, dropout is left to torch, which stores them all


def attend_causally(operands: Operands, dropout_p: float) -> Float[Tensor, "Tq H D"]:
    """Compute attention of query i to keys 0 … i, as with torch's ``is_causal``; every token takes part."""
    padded = _Padded.of(operands, None)
    out = F.scaled_dot_product_attention(padded.q, padded.k, padded.v, dropout_p=dropout_p, is_causal=True)
    return padded.packed_queries(out)


def dropout_is_torchs(operands: Operands) -> bool:
    """Return whether dropout is best left to torch: on a CPU, whose kernels have no dropout, if there are few scores.

    Measured on a CPU for 8 × 197 tokens, forward and backward: torch takes a fifth of the packed operation's time.
    """
    _, _, longest_q, longest_k = operands.lengths
    scores = operands.keys.batch_size * operands.q.shape[1] * longest_q * longest_k
    return operands.q.device.type == "cpu" and scores <= _SCORES_DROPPED


def attend_under_mask(
    operands: Operands, mask: Float[Tensor, "b h L S"] | None, dropout_p: float
) -> Float[Tensor, "Tq H D"]:
    """Compute attention with ``mask``, if there is one, added to the scores; a query without a key gives 0."""
    padded = _Padded.of(operands, mask)
    out = F.scaled_dot_product_attention(padded.q, padded.k, padded.v, padded.added, dropout_p)
    return padded.packed_queries(out if padded.without_key is None else out.masked_fill(padded.without_key, 0))


def attend_with_weights(
    operands: Operands, mask: Float[Tensor, "b h L S"] | None, dropout_p: float, average: bool
) -> tuple[Float[Tensor, "Tq H D"], Float[Tensor, "..."]]:
    """Compute the output and the attention weights, a bounded number of scores at a time.

    Apart from the weights, only a bounded number of scores is in memory; the backward pass computes the others again.
    Weights are 0 at masked keys, and in the rows of queries that have no key or are not among ``operands.queries``.

    Args:
        operands: queries, keys and values.
        mask: the mask that is added to the scores, or None.
        dropout_p: the share of the weights that is dropped.
        average: whether to return the mean of the weights over heads, (B, L, S), instead of (B, H, L, S).

    Returns:
        The output (Tq, H, D) and the weights.
    """
    padded = _Padded.of(operands, mask)
    may_hold = torch.is_grad_enabled() and padded.num_scores <= _SCORES_HELD
    at_once = _SCORES_IN_CACHE if padded.q.device.type == "cpu" else _SCORES_IN_MEMORY
    blocks = _blocks(padded, max(padded.num_scores, 1) if may_hold else at_once)

    def attend(block: _Block) -> tuple[Tensor, Tensor]:
        return _attend_block(padded, block, dropout_p, average)

    if len(blocks) == 1:
        out, weights = attend(blocks[0])
    elif torch.is_grad_enabled():
        out, weights = _joined(blocks, [checkpoint(attend, block, use_reentrant=False) for block in blocks])
    else:
        out, weights = _filled(attend, blocks, padded.q.shape[0], padded.q.shape[2])
    weights = scatter_rows(rows_of(weights, padded.aligned_queries), operands.queries)
    out = rows_of(out, padded.aligned_queries)
    return out, weights if average else weights.transpose(1, 2)


@dataclass(frozen=True)
class _Padded:
    """Operands padded to one batch.

    Attributes:
        q, k, v: (B, H, Lm, D) and (B, H, M, D), 0 after a sequence's end.
        added: (b, h, Lm or 1, M), added to the scores, −inf after a sequence's end; finite in rows without a key.
        without_key: (b, h, Lm or 1, 1) bool, the rows in which no key takes part; None if ``added`` is.
        aligned_queries: the packing of the queries in (B, Lm).
        key_BM: (B, M), the index of each column's key, 0 after a sequence's end; None if it is the column's own.
        num_keys: S.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    added: Tensor | None
    without_key: Tensor | None
    aligned_queries: Packing
    key_BM: Tensor | None
    num_keys: int

    @classmethod
    def of(cls, operands: Operands, mask: Tensor | None) -> _Padded:
        queries, keys = left_aligned(operands.queries), left_aligned(operands.keys)
        q, k, v = (
            scatter_rows(x, packing).transpose(1, 2)
            for x, packing in ((operands.q, queries), (operands.k, keys), (operands.v, keys))
        )
        query_BL, key_BM = (
            None if aligned is packing else scatter_rows(packing.indices % max(packing.num_tokens, 1), aligned)
            for packing, aligned in ((operands.queries, queries), (operands.keys, keys))
        )
        added = None if mask is None else _gathered(mask.to(q.dtype), query_BL, key_BM)
        if operands.key_bias is not None:
            bias_BM = scatter_rows(operands.key_bias, keys).to(q.dtype)[:, None, None, :]
            added = bias_BM if added is None else added + bias_BM
        if not is_full(keys):
            absent_BM = ~scatter_rows(torch.ones_like(keys.indices, dtype=torch.bool), keys)[:, None, None, :]
            added = absent_BM.new_zeros(absent_BM.shape, dtype=q.dtype) if added is None else added
            added = added.masked_fill(absent_BM, float("-inf"))
        without_key = None
        if added is not None:
            without_key = added.detach().isneginf().all(dim=-1, keepdim=True)
            added = added.masked_fill(without_key, 0)
        return cls(q, k, v, added, without_key, queries, key_BM, operands.keys.num_tokens)

    @property
    def num_scores(self) -> int:
        """B·H·Lm·M."""
        return self.q.shape[:3].numel() * self.k.shape[2]

    def packed_queries(self, out_BHLD: Tensor) -> Tensor:
        """Pack the output, (B, H, Lm, D) → (Tq, H, D)."""
        return rows_of(out_BHLD.transpose(1, 2), self.aligned_queries)


def _gathered(mask: Tensor, query_BL: Tensor | None, key_BM: Tensor | None) -> Tensor:
    """Gather the rows and columns of a (b, h, L, S) mask that take part: (B, h, Lm, M), or the mask unchanged."""
    for index, dim in ((query_BL, 2), (key_BM, 3)):
        if index is not None:
            shape = [index.shape[0], *mask.shape[1:]]
            mask = mask.expand(shape)
            shape[dim] = index.shape[1]
            mask = mask.gather(dim, (index[:, None, :, None] if dim == 2 else index[:, None, None, :]).expand(shape))
    return mask


_Block = tuple[slice, slice]  # a slice of the sequences and one of their queries


def _blocks(padded: _Padded, scores_at_once: int) -> list[_Block]:
    """Split the queries into blocks of several sequences if these fit, else of some queries of one, in row order."""
    B, H, Lm, _ = padded.q.shape
    M = padded.k.shape[2]
    sequences = min(max(1, scores_at_once // max(1, H * Lm * M)), max(B, 1))
    queries = min(max(1, scores_at_once // max(1, sequences * H * M)), max(Lm, 1))
    return [
        (slice(b, min(b + sequences, B)), slice(i, min(i + queries, Lm)))
        for b in range(0, max(B, 1), sequences)
        for i in range(0, max(Lm, 1), queries)
    ]


def _attend_block(padded: _Padded, block: _Block, dropout_p: float, average: bool) -> tuple[Tensor, Tensor]:
    """Compute a block's output (b, Q, H, D) and weights, (b, Q, S) or (b, Q, H, S)."""
    sequences, rows = block
    scores = (padded.q[sequences, :, rows] * padded.q.shape[-1] ** -0.5) @ padded.k[sequences].transpose(-2, -1)
    without_key = None
    if padded.added is not None and padded.without_key is not None:
        added, without_key = (_block_of(x, block) for x in (padded.added, padded.without_key))
        scores = scores + added
    weights = scores.softmax(dim=-1)
    if without_key is not None:
        weights = weights.masked_fill(without_key, 0)
    weights = F.dropout(weights, dropout_p)
    out = (weights @ padded.v[sequences].to(weights.dtype)).to(padded.v.dtype)
    weights = weights.mean(dim=1) if average else weights.transpose(1, 2)
    if padded.key_BM is not None:
        key_bM = padded.key_BM[sequences]
        index = key_bM[:, None] if average else key_bM[:, None, None]
        columns = weights.new_zeros((*weights.shape[:-1], padded.num_keys))
        # Columns after a sequence's end have weight 0 and share index 0 with a key, so they are added, not assigned.
        weights = columns.scatter_add(-1, index.expand(weights.shape), weights)
    return out.transpose(1, 2), weights


def _block_of(x: Tensor, block: _Block) -> Tensor:
    """Return a block of (b, h, Lm, ·), where b and Lm may be 1 to broadcast."""
    sequences, rows = block
    x = x if x.shape[0] == 1 else x[sequences]
    return x if x.shape[2] == 1 else x[:, :, rows]


def _joined(blocks: list[_Block], pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate the blocks' results: the queries of a sequence along axis 1, then the sequences along axis 0."""
    of_sequences: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for (sequences, _), piece in zip(blocks, pieces, strict=True):
        of_sequences.setdefault(sequences.start, []).append(piece)
    rows = [[torch.cat(x, dim=1) for x in zip(*some, strict=True)] for some in of_sequences.values()]
    out, weights = (torch.cat(x) for x in zip(*rows, strict=True))
    return out, weights


def _filled(
    attend: Callable[[_Block], tuple[Tensor, Tensor]], blocks: list[_Block], batch_size: int, queries: int
) -> list[Tensor]:
    """Compute the blocks one after another, and write each result into its slice of the output."""
    filled: list[Tensor] = []
    for block in blocks:
        pieces = attend(block)
        if not filled:
            filled = [x.new_empty((batch_size, queries, *x.shape[2:])) for x in pieces]
        for x, piece in zip(filled, pieces, strict=True):
            x[block] = piece
    return filled
