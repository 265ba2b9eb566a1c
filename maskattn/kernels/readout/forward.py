"""Attention of R ≤ 16 queries of each sequence over its keys, and the attention rows.

The kernel is bound by memory, so it reads K and V once. One program per head, sequence and *split*, a range of the
sequence's keys, lets even few sequences fill the chip. For its split a program stores the maximum m_s of the scores,
the sum l_s of their weights exp(score − m_s) and the weighted sum a_s of the values; a second kernel combines the
splits in a fixed order:

    m = max_s m_s      l = Σ_s l_s exp(m_s − m)      out = Σ_s a_s exp(m_s − m) / l      lse = log l + m

The attention rows need m and l. The first kernel stores raw scores in the memory of the rows, and the second converts
them to weights in place. This moves 12 bytes per key for each of R rows (less what the cache still holds), whereas
computing the scores again would read K again, 2·D bytes per key in half precision. With one split and without rows, the
results of the first kernel are final and the second is not launched.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width, S splits; N keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.language.scores import begin_scores, kept_factors, key_terms, query_terms, scores
from maskattn.kernels.language.softmax import exponential, finite_or_zero, row_divisor, row_lse, softmax_update
from maskattn.kernels.language.tiles import aligned, load_rows, sequence_base, sequence_bounds
from maskattn.kernels.launch.arguments import VARYING, empty_rest
from maskattn.kernels.launch.prepared import Launch, launch_prepared
from maskattn.kernels.launch.recording import allocate
from maskattn.kernels.launch.replay import replayed
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.readout.call import launch, prepare
from maskattn.kernels.readout.tiles import (
    load_readout,
    products,
    readout_position,
    split_bounds,
    weighted_sum,
)
from maskattn.operands import Sequences
from maskattn.options import Options

__all__ = ["combine_kernel", "readout_forward", "readout_kernel"]

# Tokens of an attention row that a program of the second kernel normalises, and splits that it sums at a time.
BLOCK_TOKENS = 1024
BLOCK_SPLITS = 16


@triton.jit
def store_lse(lse_ptr, lse_rest_ptr, offsets, maximum, total, mask):
    """Write lse, −inf for rows without keys, and its rest."""
    lse, rest = row_lse(maximum, total, True)
    tl.store(lse_ptr + offsets, lse, mask=mask)
    if lse_rest_ptr is not None:
        tl.store(lse_rest_ptr + offsets, rest, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def readout_kernel(
    q,
    k,
    v,
    terms,
    bounds,
    batch,
    heads,
    queries,
    tokens,
    out_ptr,
    lse_ptr,
    lse_rest_ptr,
    maxima_ptr,
    totals_ptr,
    scores_ptr,
    splits,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Compute the weighted sum (S, B, R, H, D), maximum and sum (S, B, R, H) and raw scores (R, H, T) of one split.

    With ``lse_ptr`` there is only one split, so that out (B, R, H, D) and lse (B, R, H) are final.
    """
    head, split, sequence = readout_position(heads, splits)
    start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
    begin, end = split_bounds(length, split, splits, BLOCK_N)
    q, k, v = aligned(q), aligned(k), aligned(v)
    k_base_ptr = sequence_base(k.ptr, sequence, head, start, 0, k.stride_h, k.stride_t, False)
    v_base_ptr = sequence_base(v.ptr, sequence, head, start, 0, v.stride_h, v.stride_t, False)
    # [R, D]
    q_tile = load_readout(q, sequence, head, queries, HEAD_WIDTH, BLOCK_D, BLOCK_R)
    rows_R, rows_N = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    scoring = begin_scores(terms, head, sequence, 0, start, True, False, True)
    of_queries = query_terms(scoring, 0, rows_R, rows_R < queries, False, True)
    out = tl.zeros([SLOTS * BLOCK_R, BLOCK_D], tl.float32)
    maximum = tl.full([SLOTS, BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([SLOTS, BLOCK_R], tl.float32)
    for first in tl.range(begin, end, BLOCK_N):
        inside = first + rows_N < end
        # Both are loaded before either is used, so that loads in flight hide the latency.
        k_tile = load_rows(k_base_ptr, first, rows_N, k.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        v_tile = load_rows(v_base_ptr, first, rows_N, v.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        # [N, R]
        of_keys = key_terms(scoring, first, rows_N, inside, False, True)
        score = scores(products(k_tile, q_tile, BLOCK_R), scoring, of_queries, of_keys, True)
        values = tl.where(inside[:, None], score.tile, float("-inf"))
        if scores_ptr is not None:
            row_ptr = scores_ptr + (rows_R * heads + head).to(tl.int64) * tokens
            pointers = row_ptr[None, :] + (start.to(tl.int64) + first + rows_N)[:, None]
            tl.store(pointers, values, mask=inside[:, None] & (rows_R < queries)[None, :])
        # A slot may have no key so far.
        values = tl.reshape(values, [BLOCK_N // SLOTS, SLOTS, BLOCK_R])
        p, factor, maximum, total = softmax_update(values, None, maximum, total, 0, True, True)
        p = tl.reshape(p, [BLOCK_N, BLOCK_R])
        kept = kept_factors(scoring, 0, first, BLOCK_R, BLOCK_N, True)
        if kept.factors is not None:
            p *= kept.factors
        factor_of_sums = factor if BLOCK_R == 1 else tl.trans(factor)
        out = out * factor_of_sums + weighted_sum(p, v_tile, BLOCK_R, SLOTS)

    # [R]
    peak = finite_or_zero(tl.max(maximum, 0))
    factor = exponential(maximum - peak[None, :])
    total = tl.sum(total * factor, 0)
    maximum = tl.max(maximum, 0)
    if BLOCK_R == 1:
        out = tl.sum(out * factor, 0, keep_dims=True)
    offsets = ((split.to(tl.int64) * batch + sequence) * queries + rows_R) * heads + head
    if lse_ptr is not None:
        # The output of a row without keys is 0.
        out = out / row_divisor(total)[:, None]
        store_lse(lse_ptr, lse_rest_ptr, offsets, maximum, total, rows_R < queries)
    else:
        tl.store(maxima_ptr + offsets, maximum, mask=rows_R < queries)
        tl.store(totals_ptr + offsets, total, mask=rows_R < queries)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows_R < queries)[:, None] & (columns < HEAD_WIDTH)[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets[:, None] * HEAD_WIDTH + columns[None, :], out, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    split_out_ptr,
    maxima_ptr,
    totals_ptr,
    out_ptr,
    lse_ptr,
    lse_rest_ptr,
    weights_ptr,
    starts_ptr,
    batch,
    heads,
    queries,
    splits,
    tokens,
    tiles,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Compute out and lse of one row of one head and sequence from its splits, and its weights from raw scores."""
    program = tl.program_id(0)
    tile, offset = program % tiles, (program // tiles).to(tl.int64)
    count = tl.cast(batch * queries, tl.int64) * heads
    # [S]
    shares = tl.arange(0, BLOCK_S)
    maxima = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        there = first + shares < splits
        share_ptr = maxima_ptr + (first + shares) * count + offset
        maxima = tl.maximum(maxima, tl.load(share_ptr, mask=there, other=float("-inf")))
    maximum = tl.max(maxima, 0)
    peak = finite_or_zero(maximum)
    total = tl.zeros([BLOCK_S], tl.float32)
    out = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    columns = tl.arange(0, BLOCK_D)
    for first in range(0, splits, BLOCK_S):
        there = first + shares < splits
        share = (first + shares) * count + offset
        factor = exponential(tl.load(maxima_ptr + share, mask=there, other=float("-inf")) - peak)
        total += factor * tl.load(totals_ptr + share, mask=there, other=0.0)
        mask = (there & (tile == 0))[:, None] & (columns < HEAD_WIDTH)[None, :]
        share_ptr = split_out_ptr + share * HEAD_WIDTH
        out += factor[:, None] * tl.load(share_ptr[:, None] + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    divisor = row_divisor(total)
    store_lse(lse_ptr, lse_rest_ptr, offset, maximum, total, tile == 0)
    out = (tl.sum(out, 0) / divisor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset * HEAD_WIDTH + columns, out, mask=(columns < HEAD_WIDTH) & (tile == 0))
    if weights_ptr is not None:
        head, query, sequence = offset % heads, offset // heads % queries, offset // heads // queries
        start, length = sequence_bounds(starts_ptr, starts_ptr + 1, sequence)
        token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        row_ptr = weights_ptr + (query * heads + head) * tokens + start
        score = tl.load(row_ptr + token, mask=token < length, other=float("-inf"))
        tl.store(row_ptr + token, exponential(score - peak) / divisor, mask=token < length)


def readout_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, options: Options, need_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the attention of a few queries of each sequence over its packed keys.

    Args:
        q: (B, R, H, D), R ≤ 16, any strides.
        k, v: (T, H, D), any strides.
        cu_seqlens: (B + 1,) int32, from 0 to T.
        max_seqlen: upper bound of the sequences' lengths.
        options: the options, in the shapes for packed tensors; coords_q is (B, R, 2).
        need_rows: whether to compute the attention rows.

    Returns:
        out (B, R, H, D) in q's dtype, lse (B, R, H) float32, its rest, and rows (R, H, T) float32, the softmax weights
        before dropout, or (R, H, 0).
    """
    if q.shape[0] * q.shape[2] == 0:
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        rows = lse.new_zeros((q.shape[1], q.shape[2], k.shape[0] if need_rows else 0))
        return torch.empty_like(q), lse, empty_rest(lse, options), rows
    sequences = Sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out, lse, rest, rows = replayed(_with_rows if need_rows else _without_rows, (q, k, v), sequences, options)
    return out, lse, rest, rows


def _with_rows(
    qkv: tuple[Tensor, Tensor, Tensor], sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _readout_forward(*qkv, sequences.cu_seqlens_k, sequences.max_seqlen_k, options, True)


def _without_rows(
    qkv: tuple[Tensor, Tensor, Tensor], sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _readout_forward(*qkv, sequences.cu_seqlens_k, sequences.max_seqlen_k, options, False)


def _readout_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, options: Options, need_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, R, H, D = q.shape
    out = allocate((B, R, H, D), q.dtype, q.device)
    lse = allocate((B, R, H), torch.float32, q.device)
    rest = empty_rest(lse, options)
    rows = allocate((R, H, k.shape[0] if need_rows else 0), torch.float32, q.device)
    rest_or_none = rest if rest.ndim > 1 else None
    call = prepare("readout", q, k, v, cu_seqlens, max_seqlen, options)
    if call.splits == 1 and not need_rows:
        whole = out, lse, rest_or_none, None, None, None, 1
        launch(readout_kernel, call.programs, call, whole, call.widths, q)
        return out, lse, rest, rows
    weights = rows if need_rows else None
    split_out = allocate((call.splits, B, R, H, D), torch.float32, q.device)
    maxima, totals = (allocate((call.splits, B, R, H), torch.float32, q.device) for _ in range(2))
    tiles = max(1, triton.cdiv(max_seqlen, BLOCK_TOKENS)) if need_rows else 1
    parts = split_out, None, None, maxima, totals, weights, call.splits
    launch(readout_kernel, call.programs, call, parts, call.widths, q)
    of_splits = split_out, maxima, totals, out, lse, rest_or_none, weights, cu_seqlens
    numbers = B, H, R, call.splits, k.shape[0], tiles
    widths = {"HEAD_WIDTH": D, "BLOCK_D": call.widths["BLOCK_D"], "BLOCK_S": BLOCK_SPLITS, "BLOCK_T": BLOCK_TOKENS}
    combine = Launch(combine_kernel, tiles * B * R * H, False, (*of_splits, *numbers), {**widths, "num_warps": 4})
    launch_prepared((combine_kernel, *numbers, *widths.values()), of_splits, lambda: combine, q)
    if weights is not None:
        clear_tail(cu_seqlens, max_seqlen, (rows.flatten(0, 1).T, 0.0))
    return out, lse, rest, rows
