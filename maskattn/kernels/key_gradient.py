"""The gradients of the keys: dk_j = s Σ_i dS_ij q_i, dv_j = Σ_i p_ij dO_i, dbias_j = Σ_i dS_ij; see ``backward.py``.

One program per tile of keys, head and sequence, after the gradient of the queries has left delta and lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.tiles import (
    LOG2_E,
    dot,
    dot_add,
    load_row_values,
    load_rows,
    program_place,
    sequence_base,
    sequence_span,
    store_row_values,
    store_rows,
    tile_rows,
)

__all__ = ["key_gradient_kernel"]


@triton.jit
def add_queries_to_key_gradient(
    dk,
    dv,
    dbias,
    k,
    v,
    bias_log2,
    q_base_ptr,
    dout_base_ptr,
    lse_log2_base_ptr,
    delta_base_ptr,
    q_index_ptr,
    q_start,
    q_begin,
    q_end,
    scale_log2,
    stride_qt,
    stride_gt,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_Q: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """dk + dSᵀ·Q, dv + Pᵀ·dO, dbias + Σ dSᵀ over the queries ``q_begin`` to ``q_end``."""
    for first in tl.range(q_begin, q_end, BLOCK_M):
        inside = first + tl.arange(0, BLOCK_M) < q_end
        rows = tile_rows(q_index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, PARTIAL)
        # [M, D]
        q = load_rows(q_base_ptr, first, rows, stride_qt, inside, HEAD_WIDTH, BLOCK_D, INDEX_Q, PARTIAL)
        # [M]; rows past the end have lse +inf, hence p = 0, and need no other mask.
        lse_log2 = load_row_values(lse_log2_base_ptr, first, rows, 1, inside, float("inf"), INDEX_Q, PARTIAL)
        # [N, M]
        scores = dot(k, tl.trans(q)) * scale_log2
        if HAS_BIAS:
            scores += bias_log2[:, None]
        p = tl.exp2(scores - lse_log2[None, :])
        # [M, D]; read this late so that the products do not hold their operands at once.
        dout = load_rows(dout_base_ptr, first, rows, stride_gt, inside, HEAD_WIDTH, BLOCK_D, INDEX_Q, PARTIAL)
        dv = dot_add(p.to(dout.dtype), dout, dv)
        delta = load_row_values(delta_base_ptr, first, rows, 1, inside, 0.0, INDEX_Q, PARTIAL)
        ds = p * (dot(v, tl.trans(dout)) - delta[None, :])
        if HAS_BIAS:
            dbias += tl.sum(ds, 1)
        dk = dot_add(ds.to(q.dtype), q, dk)
    return dk, dv, dbias


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse_log2_ptr,
    dout_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dbias_ptr,
    q_starts_ptr,
    q_ends_ptr,
    q_index_ptr,
    k_starts_ptr,
    k_ends_ptr,
    k_index_ptr,
    scale,
    scale_log2,
    heads,
    tiles,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dvb,
    stride_dvh,
    stride_dvt,
    stride_dbb,
    stride_dbh,
    stride_dbt,
    stride_lb,
    stride_lh,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_Q: tl.constexpr,
    INDEX_K: tl.constexpr,
):
    """dk, dv and dbias of one tile of keys."""
    tile, head, sequence = program_place(tiles, heads)
    k_start, k_length = sequence_span(k_starts_ptr, k_ends_ptr, sequence)
    first = tile * BLOCK_N
    if first >= k_length:
        return
    q_start, q_length = sequence_span(q_starts_ptr, q_ends_ptr, sequence)

    # [N]
    inside = first + tl.arange(0, BLOCK_N) < k_length
    rows = tile_rows(k_index_ptr, k_start, first, inside, BLOCK_N, INDEX_K, True)
    bias_log2 = 0.0
    if HAS_BIAS:
        bias_base_ptr = sequence_base(bias_ptr, sequence, head, k_start, stride_bb, stride_bh, stride_bt, INDEX_K)
        bias_log2 = load_row_values(bias_base_ptr, first, rows, stride_bt, inside, 0.0, INDEX_K, True) * LOG2_E
    # [N, D]
    k_base_ptr = sequence_base(k_ptr, sequence, head, k_start, stride_kb, stride_kh, stride_kt, INDEX_K)
    k = load_rows(k_base_ptr, first, rows, stride_kt, inside, HEAD_WIDTH, BLOCK_D, INDEX_K, True)
    v_base_ptr = sequence_base(v_ptr, sequence, head, k_start, stride_vb, stride_vh, stride_vt, INDEX_K)
    v = load_rows(v_base_ptr, first, rows, stride_vt, inside, HEAD_WIDTH, BLOCK_D, INDEX_K, True)

    q_base_ptr = sequence_base(q_ptr, sequence, head, q_start, stride_qb, stride_qh, stride_qt, INDEX_Q)
    dout_base_ptr = sequence_base(dout_ptr, sequence, head, q_start, stride_gb, stride_gh, stride_gt, INDEX_Q)
    lse_log2_base_ptr = sequence_base(lse_log2_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
    delta_base_ptr = sequence_base(delta_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    q_full = q_length // BLOCK_M * BLOCK_M
    dk, dv, dbias = add_queries_to_key_gradient(
        dk, dv, dbias, k, v, bias_log2, q_base_ptr, dout_base_ptr, lse_log2_base_ptr, delta_base_ptr, q_index_ptr,
        q_start, 0, q_full, scale_log2, stride_qt, stride_gt, HEAD_WIDTH, BLOCK_D, BLOCK_M, HAS_BIAS, INDEX_Q, False,
    )  # fmt: skip
    dk, dv, dbias = add_queries_to_key_gradient(
        dk, dv, dbias, k, v, bias_log2, q_base_ptr, dout_base_ptr, lse_log2_base_ptr, delta_base_ptr, q_index_ptr,
        q_start, q_full, q_length, scale_log2, stride_qt, stride_gt, HEAD_WIDTH, BLOCK_D, BLOCK_M, HAS_BIAS, INDEX_Q,
        True,
    )  # fmt: skip
    dk_base_ptr = sequence_base(dk_ptr, sequence, head, k_start, stride_dkb, stride_dkh, stride_dkt, INDEX_K)
    store_rows(dk_base_ptr, first, rows, stride_dkt, inside, dk * scale, HEAD_WIDTH, BLOCK_D, INDEX_K)
    dv_base_ptr = sequence_base(dv_ptr, sequence, head, k_start, stride_dvb, stride_dvh, stride_dvt, INDEX_K)
    store_rows(dv_base_ptr, first, rows, stride_dvt, inside, dv, HEAD_WIDTH, BLOCK_D, INDEX_K)
    if HAS_BIAS:
        dbias_base_ptr = sequence_base(dbias_ptr, sequence, head, k_start, stride_dbb, stride_dbh, stride_dbt, INDEX_K)
        store_row_values(dbias_base_ptr, first, rows, stride_dbt, inside, dbias, INDEX_K)
