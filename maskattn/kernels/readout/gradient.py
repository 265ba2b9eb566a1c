"""Backward of the readout, with the weights p recomputed from the lse that forward left.

With dO, dlse and dw the gradients of out, lse and the attention rows, m the dropout factors and s the scale:

    delta_r = Σ_d dO_rd out_rd + Σ_j p_rj dw_rj − dlse_r      dS_rj = p_rj (m_rj dO_r·v_j + dw_rj − delta_r)

    dq_r = s Σ_j dS_rj k_j    dk_j = s Σ_r dS_rj q_r    dv_j = Σ_r m_rj p_rj dO_r    dbias_j = Σ_r dS_rj
    dslope = −Σ_rj dS_rj ‖x_r − x_j‖

One program computes a key's terms of all R rows, so that dk, dv and dbias are written once; dq and dslope are sums over
a sequence's splits, whose terms are added in a fixed order. K and V are read once. If the rows have a gradient,
Σ_j p_rj dw_rj must be known first and costs a pass over K; correcting dk for it afterwards would cost more.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width, S splits; N keys of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.language.bundles import ABSENT, Tokens
from maskattn.kernels.language.scores import (
    begin_scores,
    gradient_of_terms,
    kept_factors,
    key_terms,
    query_terms,
    scores,
)
from maskattn.kernels.language.tiles import (
    aligned,
    load_rows,
    sequence_base,
    sequence_bounds,
    store_row_values,
    store_rows,
)
from maskattn.kernels.launch.arguments import VARYING, known_multiple
from maskattn.kernels.launch.recording import allocate
from maskattn.kernels.launch.replay import replayed
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.readout.call import ReadoutCall, launch, prepare, readout_argument
from maskattn.kernels.readout.tiles import (
    load_lse,
    load_readout,
    load_row_gradient,
    products,
    readout_position,
    split_bounds,
    spread,
    weighted_sum,
    weights_of,
)
from maskattn.operands import QKV, KeySequences, Sequences
from maskattn.options import Options
from maskattn.results import Gradients, Outputs, ReadoutGradients

__all__ = ["readout_backward", "readout_gradient_kernel", "row_gradient_kernel"]


@triton.jit(do_not_specialize=VARYING)
def row_gradient_kernel(
    q,
    k,
    v,
    terms,
    bounds,
    batch,
    heads,
    queries,
    tokens,
    lse_ptr,
    lse_rest_ptr,
    drows,
    sums_ptr,
    splits,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Compute Σ_j p_rj dw_rj of one split, (S, B, R, H)."""
    head, split, sequence = readout_position(heads, splits)
    start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
    begin, end = split_bounds(length, split, splits, BLOCK_N)
    q, k = aligned(q), aligned(k)
    k_base_ptr = sequence_base(k.ptr, sequence, head, start, 0, k.stride_h, k.stride_t, False)
    q_tile = load_readout(q, sequence, head, queries, HEAD_WIDTH, BLOCK_D, BLOCK_R)
    offset = sequence * queries * heads + head
    lse = load_lse(lse_ptr, offset, heads, queries, BLOCK_R)

    rows_R, rows_N = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    scoring = begin_scores(terms, head, sequence, 0, start, True, False, True)
    of_queries = query_terms(scoring, 0, rows_R, rows_R < queries, False, True)
    sums = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for first in tl.range(begin, end, BLOCK_N):
        inside = first + rows_N < end
        k_tile = load_rows(k_base_ptr, first, rows_N, k.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        of_keys = key_terms(scoring, first, rows_N, inside, False, True)
        score = scores(products(k_tile, q_tile, BLOCK_R), scoring, of_queries, of_keys, True)
        values = tl.where(inside[:, None], score.tile, float("-inf"))
        p = weights_of(values, lse, lse_rest_ptr, offset, heads, queries, BLOCK_R)
        dw = load_row_gradient(drows, head, start, first, inside, queries, BLOCK_R, BLOCK_N)
        sums += tl.where(p > 0, p * dw, 0.0)
    offsets = ((split.to(tl.int64) * batch + sequence) * queries + rows_R) * heads + head
    tl.store(sums_ptr + offsets, tl.sum(sums, 0), mask=rows_R < queries)


@triton.jit(do_not_specialize=VARYING)
def readout_gradient_kernel(
    q,
    k,
    v,
    terms,
    bounds,
    batch,
    heads,
    queries,
    tokens,
    out,
    dout,
    lse_ptr,
    lse_rest_ptr,
    shift_ptr,
    drows,
    dq_ptr,
    dk,
    dv,
    dbias,
    dslopes_ptr,
    splits,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Compute dk, dv and dbias of one split's keys, and its terms of dq (S, B, R, H, D) and dslope (S, B, H).

    ``shift_ptr`` (B, R, H) is Σ_j p_rj dw_rj − dlse_r, which delta adds to dO·out; None for 0.
    """
    head, split, sequence = readout_position(heads, splits)
    start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
    begin, end = split_bounds(length, split, splits, BLOCK_N)
    q, k, v = aligned(q), aligned(k), aligned(v)
    out, dout, dk, dv = aligned(out), aligned(dout), aligned(dk), aligned(dv)
    k_base_ptr = sequence_base(k.ptr, sequence, head, start, 0, k.stride_h, k.stride_t, False)
    v_base_ptr = sequence_base(v.ptr, sequence, head, start, 0, v.stride_h, v.stride_t, False)
    dk_base_ptr = sequence_base(dk.ptr, sequence, head, start, 0, dk.stride_h, dk.stride_t, False)
    dv_base_ptr = sequence_base(dv.ptr, sequence, head, start, 0, dv.stride_h, dv.stride_t, False)
    if dbias.ptr is not None:
        dbias_base_ptr = sequence_base(dbias.ptr, sequence, head, start, 0, dbias.stride_h, dbias.stride_t, False)
    rows_R, rows_N = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    offset = sequence * queries * heads + head
    q_tile = load_readout(q, sequence, head, queries, HEAD_WIDTH, BLOCK_D, BLOCK_R)
    dout_tile = load_readout(dout, sequence, head, queries, HEAD_WIDTH, BLOCK_D, BLOCK_R)
    out_tile = load_readout(out, sequence, head, queries, HEAD_WIDTH, BLOCK_D, BLOCK_R)
    lse = load_lse(lse_ptr, offset, heads, queries, BLOCK_R)
    # The gradient of a row without keys is ignored, even if it is NaN.
    dout_tile = tl.where(lse[:, None] == float("inf"), 0.0, dout_tile).to(k.ptr.dtype.element_ty)
    delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if shift_ptr is not None:
        delta += tl.load(shift_ptr + offset + rows_R * heads, mask=rows_R < queries, other=0.0)
    scoring = begin_scores(terms, head, sequence, 0, start, True, False, True)
    of_queries = query_terms(scoring, 0, rows_R, rows_R < queries, False, True)

    dq = tl.zeros([SLOTS * BLOCK_R, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for first in tl.range(begin, end, BLOCK_N):
        inside = first + rows_N < end
        k_tile = load_rows(k_base_ptr, first, rows_N, k.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        v_tile = load_rows(v_base_ptr, first, rows_N, v.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        # [N, R]
        of_keys = key_terms(scoring, first, rows_N, inside, False, True)
        score = scores(products(k_tile, q_tile, BLOCK_R), scoring, of_queries, of_keys, True)
        values = tl.where(inside[:, None], score.tile, float("-inf"))
        p = weights_of(values, lse, lse_rest_ptr, offset, heads, queries, BLOCK_R)
        dp = products(v_tile, dout_tile, BLOCK_R)
        weights = p
        kept = kept_factors(scoring, 0, first, BLOCK_R, BLOCK_N, True)
        if kept.factors is not None:
            weights, dp = p * kept.factors, dp * kept.factors
        dv_tile = spread(weights, dout_tile, BLOCK_R)
        store_rows(dv_base_ptr, first, rows_N, dv.stride_t, inside, dv_tile, HEAD_WIDTH, BLOCK_D, False)
        if drows.ptr is not None:
            dp += load_row_gradient(drows, head, start, first, inside, queries, BLOCK_R, BLOCK_N)
        # Where p is 0, the other factor may be NaN.
        ds = tl.where(p > 0, p * (dp - delta[None, :]), 0.0)
        if dbias.ptr is not None:
            store_row_values(dbias_base_ptr, first, rows_N, dbias.stride_t, inside, tl.sum(ds, 1), False)
        back = gradient_of_terms(score, ds)
        if back.slope is not None:
            dslope += back.slope
        dk_tile = spread(back.product, q_tile, BLOCK_R) * terms.scale
        store_rows(dk_base_ptr, first, rows_N, dk.stride_t, inside, dk_tile, HEAD_WIDTH, BLOCK_D, False)
        dq += weighted_sum(back.product, k_tile, BLOCK_R, SLOTS)

    if BLOCK_R == 1:
        dq = tl.sum(dq, 0, keep_dims=True)
    if dslopes_ptr is not None:
        share = (split * batch + sequence) * heads + head
        tl.store(dslopes_ptr + share, -tl.sum(tl.sum(dslope, 0), 0))
    offsets = ((split.to(tl.int64) * batch + sequence) * queries + rows_R) * heads + head
    columns = tl.arange(0, BLOCK_D)
    mask = (rows_R < queries)[:, None] & (columns < HEAD_WIDTH)[None, :]
    dq = (dq * terms.scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offsets[:, None] * HEAD_WIDTH + columns[None, :], dq, mask=mask)


def readout_backward(
    grads: ReadoutGradients, qkv: QKV, outputs: Outputs, sequences: KeySequences, options: Options
) -> Gradients:
    """Return contiguous gradients of :func:`maskattn.kernels.readout.forward.readout_forward`.

    Args:
        grads: gradients of out (B, R, H, D), with any strides, of lse (B, R, H) and of the rows (R, H, T).
        qkv, sequences, options: the arguments of forward.
        outputs: the results of forward; the rows are not needed.
    """
    q, k, v = vars(qkv).values()
    bias, slopes = options.key_bias, options.slopes
    if q.shape[0] * q.shape[2] == 0:
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        return Gradients(torch.empty_like(q), dk, dv, _zeros_of(bias), _zeros_of(slopes))
    where = Sequences(sequences.cu_seqlens, sequences.cu_seqlens, sequences.max_seqlen, sequences.max_seqlen)
    tensors = q, k, v, outputs.out, outputs.lse, outputs.lse_rest, *vars(grads).values()
    dq, dk, dv, dbias, dslopes = replayed(_parts, tensors, where, options)
    return Gradients(
        q=dq if dq.ndim == q.ndim else dq.sum(0).to(q.dtype),
        k=dk,
        v=dv,
        key_bias=None if bias is None else (dbias.sum(0) if bias.ndim == 1 else dbias).to(bias.dtype),
        slopes=None if slopes is None else dslopes.sum((0, 1)).to(slopes.dtype),
    )


def _parts(tensors: tuple[Any, ...], sequences: Sequences, options: Options) -> tuple[Tensor | None, ...]:
    """Return dq, or its terms of each split (S, B, R, H, D) if there are several; dk and dv; the gradient of a bias of
    each head (T, H), or (H, T) if the heads share it; and the terms of dslopes, (S, B, H)."""
    q, k, v, out, lse, rest = tensors[:6]
    grads = ReadoutGradients(*tensors[6:])
    cu_seqlens, max_seqlen = sequences.cu_seqlens_k, sequences.max_seqlen_k
    B, R, H, D = q.shape
    bias = options.key_bias
    dk, dv = (allocate(x.shape, x.dtype, x.device) for x in (k, v))
    dbias = dslopes = None
    if bias is not None:
        dbias = allocate((H, k.shape[0]) if bias.ndim == 1 else tuple(bias.shape), torch.float32, q.device)
    call = prepare("readout_gradient", q, k, v, cu_seqlens, max_seqlen, options)
    several = call.splits > 1
    dq = allocate((call.splits, B, R, H, D) if several else q.shape, torch.float32 if several else q.dtype, q.device)
    if options.slopes is not None:
        dslopes = allocate((call.splits, B, H), torch.float32, q.device)
    lse = lse.contiguous()
    rest = rest.contiguous() if rest.ndim > 1 else None
    shift = _shift_of_delta(call, grads, lse, rest)
    own = (
        readout_argument(out), readout_argument(grads.grad_out), lse, rest, shift, _rows_argument(grads.grad_rows), dq,
        _by_token(dk), _by_token(dv), _dbias_argument(dbias, bias), dslopes, call.splits,
    )  # fmt: skip
    launch(readout_gradient_kernel, call.programs, call, own, call.widths, q)
    of_bias = () if dbias is None or bias is None else ((dbias.T if bias.ndim == 1 else dbias, 0.0),)
    clear_tail(cu_seqlens, max_seqlen, (dk, 0.0), (dv, 0.0), *of_bias)
    return dq, dk, dv, dbias, dslopes


def _shift_of_delta(call: ReadoutCall, grads: ReadoutGradients, lse: Tensor, rest: Tensor | None) -> Tensor | None:
    """Return Σ_j p_rj dw_rj − dlse_r, (B, R, H) float32 contiguous, or None for 0."""
    shift = None if grads.grad_lse is None else grads.grad_lse.to(torch.float32).neg().contiguous()
    if grads.grad_rows is None:
        return shift
    sums = allocate((call.splits, *lse.shape), torch.float32, lse.device)
    own = lse, rest, _rows_argument(grads.grad_rows), sums, call.splits
    launch(row_gradient_kernel, call.programs, call, own, call.widths, lse)
    total = sums[0] if call.splits == 1 else sums.sum(0)
    return total if shift is None else total + shift


def _rows_argument(grad_rows: Tensor | None) -> Tokens:
    """Return the argument for the (R, H, T) gradient of the attention rows, with R in place of the sequences."""
    return ABSENT if grad_rows is None else Tokens(grad_rows, *grad_rows.stride())


def _by_token(x: Tensor) -> Tokens:
    """Return the argument for a (T, H, D) tensor."""
    return Tokens(x, 0, x.stride(1), x.stride(0), known_multiple(*x.stride()[:2]))


def _dbias_argument(dbias: Tensor | None, bias: Tensor | None) -> Tokens:
    """Return the argument for the terms of a bias gradient: (H, T) if the heads share the bias, else (T, H)."""
    if dbias is None or bias is None:
        return ABSENT
    return Tokens(dbias, 0, *(dbias.stride() if bias.ndim == 1 else dbias.stride()[::-1]))


def _zeros_of(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x)
