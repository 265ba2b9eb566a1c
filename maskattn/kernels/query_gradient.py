"""The gradient of the queries: dq_i = s Σ_j dS_ij k_j; formulas and words in ``backward.py``.

One program per tile of queries, head and sequence; it also leaves delta and lse in log2 units for the
gradient of the keys.
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

__all__ = ["query_gradient_kernel"]


@triton.jit
def add_keys_to_query_gradient(
    dq,
    q,
    dout,
    lse_log2,
    delta,
    k_base_ptr,
    v_base_ptr,
    bias_base_ptr,
    k_index_ptr,
    k_start,
    k_begin,
    k_end,
    scale_log2,
    stride_kt,
    stride_vt,
    stride_bt,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_K: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """dq + dS·K over the keys ``k_begin`` to ``k_end``; ``PARTIAL`` when they do not fill their tiles."""
    for first in tl.range(k_begin, k_end, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < k_end
        rows = tile_rows(k_index_ptr, k_start, first, inside, BLOCK_N, INDEX_K, PARTIAL)
        # [N, D]
        k = load_rows(k_base_ptr, first, rows, stride_kt, inside, HEAD_WIDTH, BLOCK_D, INDEX_K, PARTIAL)
        if k.dtype == tl.float32:
            # Else the compiler reads q, then waits for k, holding more of q in registers than there are; so for v.
            tl.debug_barrier()
        # [M, N]
        scores = dot(q, tl.trans(k)) * scale_log2
        if HAS_BIAS:
            bias = load_row_values(bias_base_ptr, first, rows, stride_bt, inside, 0.0, INDEX_K, PARTIAL)
            scores += (bias * LOG2_E)[None, :]
        p = tl.exp2(scores - lse_log2[:, None])
        if PARTIAL:
            # 2^(0 − lse) may be inf, and inf · 0 is NaN.
            p = tl.where(inside[None, :], p, 0.0)
        # [N, D]; read this late so that the two products do not hold their operands at once.
        v = load_rows(v_base_ptr, first, rows, stride_vt, inside, HEAD_WIDTH, BLOCK_D, INDEX_K, PARTIAL)
        if v.dtype == tl.float32:
            tl.debug_barrier()
        ds = p * (dot(dout, tl.trans(v)) - delta[:, None])
        dq = dot_add(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dlse_ptr,
    dq_ptr,
    delta_ptr,
    lse_log2_ptr,
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
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    stride_lb,
    stride_lh,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    INDEX_Q: tl.constexpr,
    INDEX_K: tl.constexpr,
):
    """dq, delta and the row sums in log2 units of one tile of queries."""
    tile, head, sequence = program_place(tiles, heads)
    q_start, q_length = sequence_span(q_starts_ptr, q_ends_ptr, sequence)
    first = tile * BLOCK_M
    if first >= q_length:
        return
    k_start, k_length = sequence_span(k_starts_ptr, k_ends_ptr, sequence)

    # [M]
    inside = first + tl.arange(0, BLOCK_M) < q_length
    rows = tile_rows(q_index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, True)
    lse_base_ptr = sequence_base(lse_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
    lse = load_row_values(lse_base_ptr, first, rows, 1, inside, float("-inf"), INDEX_Q, True)
    # A row that attends to nothing gets +inf, so that its p is 0.
    empty = lse == float("-inf")
    lse_log2 = tl.where(empty, float("inf"), lse * LOG2_E)
    lse_log2_base_ptr = sequence_base(lse_log2_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
    store_row_values(lse_log2_base_ptr, first, rows, 1, inside, lse_log2, INDEX_Q)
    # [M, D]
    dout_base_ptr = sequence_base(dout_ptr, sequence, head, q_start, stride_gb, stride_gh, stride_gt, INDEX_Q)
    dout = load_rows(dout_base_ptr, first, rows, stride_gt, inside, HEAD_WIDTH, BLOCK_D, INDEX_Q, True)
    out_base_ptr = sequence_base(out_ptr, sequence, head, q_start, stride_ob, stride_oh, stride_ot, INDEX_Q)
    out = load_rows(out_base_ptr, first, rows, stride_ot, inside, HEAD_WIDTH, BLOCK_D, INDEX_Q, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_base_ptr = sequence_base(dlse_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
        delta -= load_row_values(dlse_base_ptr, first, rows, 1, inside, 0.0, INDEX_Q, True)
    # What comes back to such a row has nowhere to go, were it NaN.
    delta = tl.where(empty, 0.0, delta)
    delta_base_ptr = sequence_base(delta_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
    store_row_values(delta_base_ptr, first, rows, 1, inside, delta, INDEX_Q)

    q_base_ptr = sequence_base(q_ptr, sequence, head, q_start, stride_qb, stride_qh, stride_qt, INDEX_Q)
    q = load_rows(q_base_ptr, first, rows, stride_qt, inside, HEAD_WIDTH, BLOCK_D, INDEX_Q, True)
    k_base_ptr = sequence_base(k_ptr, sequence, head, k_start, stride_kb, stride_kh, stride_kt, INDEX_K)
    v_base_ptr = sequence_base(v_ptr, sequence, head, k_start, stride_vb, stride_vh, stride_vt, INDEX_K)
    bias_base_ptr = bias_ptr
    if HAS_BIAS:
        bias_base_ptr = sequence_base(bias_ptr, sequence, head, k_start, stride_bb, stride_bh, stride_bt, INDEX_K)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_full = k_length // BLOCK_N * BLOCK_N
    dq = add_keys_to_query_gradient(
        dq, q, dout, lse_log2, delta, k_base_ptr, v_base_ptr, bias_base_ptr, k_index_ptr, k_start, 0, k_full,
        scale_log2, stride_kt, stride_vt, stride_bt, HEAD_WIDTH, BLOCK_D, BLOCK_N, HAS_BIAS, INDEX_K, False,
    )  # fmt: skip
    dq = add_keys_to_query_gradient(
        dq, q, dout, lse_log2, delta, k_base_ptr, v_base_ptr, bias_base_ptr, k_index_ptr, k_start, k_full, k_length,
        scale_log2, stride_kt, stride_vt, stride_bt, HEAD_WIDTH, BLOCK_D, BLOCK_N, HAS_BIAS, INDEX_K, True,
    )  # fmt: skip
    dq_base_ptr = sequence_base(dq_ptr, sequence, head, q_start, stride_dqb, stride_dqh, stride_dqt, INDEX_Q)
    store_rows(dq_base_ptr, first, rows, stride_dqt, inside, dq * scale, HEAD_WIDTH, BLOCK_D, INDEX_Q)
