"""Forward attention: out_i = Σ_j p_ij v_j, p_ij = exp(scale·q_i·k_j + bias_j − lse_i), lse_i the log of the row's sum.

One program per tile of queries, head and sequence; the keys pass by in tiles (FlashAttention-2, arXiv 2307.08691,
algorithm 1). ``maskattn.attention.reference`` is the specification.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.configs import choose, padded_width
from maskattn.kernels.rows import (
    Rows,
    bias_strides_bht,
    kept_rows,
    lse_strides_bh,
    packed_sides,
    readable,
    strides_bht,
    whole_rows,
)
from maskattn.kernels.tiles import (
    LN_2,
    attend_keys,
    load_rows,
    program_place,
    sequence_base,
    sequence_span,
    store_row_values,
    store_rows,
    tile_rows,
)
from maskattn.options import Options, Sequences

__all__ = ["forward_kernel", "masked_forward", "packed_forward"]


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    q_starts_ptr,
    q_ends_ptr,
    q_index_ptr,
    k_starts_ptr,
    k_ends_ptr,
    k_index_ptr,
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
    """Attention of one tile of queries over all keys of its sequence."""
    tile, head, sequence = program_place(tiles, heads)
    q_start, q_length = sequence_span(q_starts_ptr, q_ends_ptr, sequence)
    first = tile * BLOCK_M
    if first >= q_length:
        return
    k_start, k_length = sequence_span(k_starts_ptr, k_ends_ptr, sequence)

    k_base_ptr = sequence_base(k_ptr, sequence, head, k_start, stride_kb, stride_kh, stride_kt, INDEX_K)
    v_base_ptr = sequence_base(v_ptr, sequence, head, k_start, stride_vb, stride_vh, stride_vt, INDEX_K)
    bias_base_ptr = bias_ptr
    if HAS_BIAS:
        bias_base_ptr = sequence_base(bias_ptr, sequence, head, k_start, stride_bb, stride_bh, stride_bt, INDEX_K)

    # [M]
    inside = first + tl.arange(0, BLOCK_M) < q_length
    rows = tile_rows(q_index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, True)
    # [M, D]
    q_base_ptr = sequence_base(q_ptr, sequence, head, q_start, stride_qb, stride_qh, stride_qt, INDEX_Q)
    q = load_rows(q_base_ptr, first, rows, stride_qt, inside, HEAD_WIDTH, BLOCK_D, INDEX_Q, True)

    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_full = k_length // BLOCK_N * BLOCK_N
    out, maximum, total = attend_keys(
        out, maximum, total, q, k_base_ptr, v_base_ptr, bias_base_ptr, k_index_ptr, k_start, 0, k_full, scale_log2,
        stride_kt, stride_vt, stride_bt, HEAD_WIDTH, BLOCK_D, BLOCK_N, HAS_BIAS, INDEX_K, False,
    )  # fmt: skip
    out, maximum, total = attend_keys(
        out, maximum, total, q, k_base_ptr, v_base_ptr, bias_base_ptr, k_index_ptr, k_start, k_full, k_length,
        scale_log2, stride_kt, stride_vt, stride_bt, HEAD_WIDTH, BLOCK_D, BLOCK_N, HAS_BIAS, INDEX_K, True,
    )  # fmt: skip

    # A row without keys has total 0 and maximum −inf: its output is 0 and its lse −inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    out_base_ptr = sequence_base(out_ptr, sequence, head, q_start, stride_ob, stride_oh, stride_ot, INDEX_Q)
    store_rows(out_base_ptr, first, rows, stride_ot, inside, out / divisor[:, None], HEAD_WIDTH, BLOCK_D, INDEX_Q)
    lse_base_ptr = sequence_base(lse_ptr, sequence, head, q_start, stride_lb, stride_lh, 1, INDEX_Q)
    store_row_values(lse_base_ptr, first, rows, 1, inside, maximum * LN_2 + tl.log(divisor), INDEX_Q)


def packed_forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences.

    Args:
        q: (Tq, H, D), any strides.
        k, v: (Tk, H, D).
        sequences: where they lie.
        options: of packed tensors.

    Returns:
        out (Tq, H, D) in q's dtype and lse (H, Tq) float32.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    _launch_forward(q, k, v, options, out, lse, *packed_sides(sequences))
    return out, lse


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tokens of dense tensors, read where they lie.

    Args:
        q: (B, H, Nq, D), any strides.
        k, v: (B, H, N, D).
        keep: (B, N) bool, True = the token takes part.
        skip_queries: background queries give out 0 and lse −inf (then Nq = N); otherwise every query attends.
        options: of dense tensors.

    Returns:
        out (B, H, Nq, D) in q's dtype and lse (B, H, Nq) float32.
    """
    k_rows = kept_rows(keep)
    q_rows = k_rows if skip_queries else whole_rows(q.shape[0], q.shape[2], q.device)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
    _launch_forward(q, k, v, options, out, lse, q_rows, k_rows)
    return out, lse


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    out: Tensor,
    lse: Tensor,
    q_rows: Rows,
    k_rows: Rows,
) -> None:
    """Fill ``out`` and ``lse``."""
    scale, key_bias = options.scale, options.key_bias
    if scale < 0:
        # The kernel takes the maximum before it scales.
        q, scale = -q, -scale
    q, k, v = readable(q), readable(k), readable(v)
    head_width, heads = q.shape[-1], q.shape[1]
    config = choose("forward", q.device, head_width, q.dtype)
    tiles = triton.cdiv(q_rows.longest, config.block_m)
    programs = tiles * heads * q_rows.starts.shape[0]
    if programs == 0:
        return
    with torch.cuda.device_of(q):
        forward_kernel[(programs,)](
            q, k, v, key_bias, out, lse, q_rows.starts, q_rows.ends, q_rows.index,
            k_rows.starts, k_rows.ends, k_rows.index, scale * math.log2(math.e), heads, tiles,
            *strides_bht(q), *strides_bht(k), *strides_bht(v),
            *bias_strides_bht(key_bias, packed=q.ndim == 3), *strides_bht(out), *lse_strides_bh(lse),
            HEAD_WIDTH=head_width, BLOCK_D=padded_width(head_width), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            HAS_BIAS=key_bias is not None, INDEX_Q=q_rows.index is not None, INDEX_K=k_rows.index is not None,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
