"""Backward attention, with P recomputed from the row sums that forward left (FlashAttention-2, algorithm 2).

With dO and dlse the gradients of the outputs, and s the scale:

    delta_i = Σ_d dO_id out_id − dlse_i       dS_ij = p_ij (dO_i·v_j − delta_i)

    dq_i = s Σ_j dS_ij k_j      dk_j = s Σ_i dS_ij q_i      dv_j = Σ_i p_ij dO_i      dbias_j = Σ_i dS_ij

Two passes without atomics, so that the result is the same every time: one program per tile of queries for dq (it also
leaves delta and lse in log2 units), then one per tile of keys for dk, dv and dbias.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width; M queries and N keys
of a tile.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from maskattn.kernels.configs import choose, padded_width
from maskattn.kernels.key_gradient import key_gradient_kernel
from maskattn.kernels.query_gradient import query_gradient_kernel
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
from maskattn.options import Gradients, Options, Sequences

__all__ = ["masked_backward", "packed_backward"]


def packed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    options: Options,
) -> Gradients:
    """Gradients of :func:`maskattn.kernels.forward.packed_forward`.

    Args:
        grad_out: (Tq, H, D), any strides.
        grad_lse: (H, Tq) or None for zeros.
        q, k, v, sequences, options: what forward was given.
        out, lse: what forward returned.

    Returns:
        Contiguous gradients.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q_rows, k_rows = packed_sides(sequences)
    key_bias = options.key_bias
    # [H, Tk] when the heads share the bias, else [Tk, H].
    shared = key_bias is not None and key_bias.ndim == 1
    dbias = None
    if key_bias is not None:
        shape = (k.shape[1], k.shape[0]) if shared else key_bias.shape
        dbias = torch.empty(shape, dtype=torch.float32, device=k.device)
    dbias_HT = dbias.T if dbias is not None and not shared else dbias
    _launch_backward(grad_out, grad_lse, q, k, v, out, lse, q_rows, k_rows, options, dq, dk, dv, dbias_HT)
    return Gradients(dq, dk, dv, _sum_over_heads(dbias, key_bias, head_dim=0 if shared else None))


def masked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    skip_queries: bool,
    options: Options,
) -> Gradients:
    """Gradients of :func:`maskattn.kernels.forward.masked_forward`; those of background tokens are 0.

    Args:
        grad_out: (B, H, Nq, D), any strides.
        grad_lse: (B, H, Nq) or None for zeros.
        q, k, v, keep, skip_queries, options: what forward was given.
        out, lse: what forward returned.

    Returns:
        Contiguous gradients.
    """
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    k_rows = kept_rows(keep)
    q_rows = k_rows if skip_queries else whole_rows(q.shape[0], q.shape[2], q.device)
    key_bias = options.key_bias
    dbias_BHN = None
    if key_bias is not None:
        dbias_BHN = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    _launch_backward(grad_out, grad_lse, q, k, v, out, lse, q_rows, k_rows, options, dq, dk, dv, dbias_BHN)
    shared = key_bias is not None and key_bias.ndim == 2
    return Gradients(dq, dk, dv, _sum_over_heads(dbias_BHN, key_bias, head_dim=1 if shared else None))


def _sum_over_heads(dbias: Tensor | None, key_bias: Tensor | None, head_dim: int | None) -> Tensor | None:
    """The gradient of a bias in its dtype; the heads that share it are summed in float32."""
    if dbias is None or key_bias is None:
        return None
    return (dbias if head_dim is None else dbias.sum(head_dim)).to(key_bias.dtype)


def _launch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_rows: Rows,
    k_rows: Rows,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
) -> None:
    """Fill dq, dk, dv and dbias, which is a view of (H, Tk) or (B, H, N)."""
    scale, key_bias = options.scale, options.key_bias
    q, k, v, out, grad_out = (readable(x) for x in (q, k, v, out, grad_out))
    lse = lse.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    delta, lse_log2 = torch.empty_like(lse), torch.empty_like(lse)
    sides = (q_rows.starts, q_rows.ends, q_rows.index, k_rows.starts, k_rows.ends, k_rows.index)
    head_width, heads, batch = q.shape[-1], q.shape[1], q_rows.starts.shape[0]
    strides_q, strides_k, strides_v, strides_out = strides_bht(q), strides_bht(k), strides_bht(v), strides_bht(out)
    strides_grad, strides_lse = strides_bht(grad_out), lse_strides_bh(lse)
    strides_bias = bias_strides_bht(key_bias, packed=q.ndim == 3)
    strides_dbias: tuple[int, ...] = (0, 0, 0)
    if dbias is not None:
        strides_dbias = (0, *dbias.stride()) if dbias.ndim == 2 else dbias.stride()
    scale_log2 = scale * math.log2(math.e)
    flags = {
        "HEAD_WIDTH": head_width,
        "BLOCK_D": padded_width(head_width),
        "HAS_BIAS": key_bias is not None,
        "INDEX_Q": q_rows.index is not None,
        "INDEX_K": k_rows.index is not None,
    }

    config = choose("query_gradient", q.device, head_width, q.dtype)
    tiles = triton.cdiv(q_rows.longest, config.block_m)
    if tiles * heads * batch > 0:
        with torch.cuda.device_of(q):
            query_gradient_kernel[(tiles * heads * batch,)](
                q, k, v, key_bias, out, lse, grad_out, grad_lse, dq, delta, lse_log2, *sides, scale, scale_log2, heads,
                tiles, *strides_q, *strides_k, *strides_v, *strides_bias, *strides_out, *strides_grad, *strides_bht(dq),
                *strides_lse, **flags, HAS_DLSE=grad_lse is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    config = choose("key_gradient", q.device, head_width, q.dtype)
    tiles = triton.cdiv(k_rows.longest, config.block_n)
    if tiles * heads * batch > 0:
        with torch.cuda.device_of(q):
            key_gradient_kernel[(tiles * heads * batch,)](
                q, k, v, key_bias, lse_log2, grad_out, delta, dk, dv, dbias, *sides, scale, scale_log2, heads, tiles,
                *strides_q, *strides_k, *strides_v, *strides_bias, *strides_grad, *strides_bht(dk), *strides_bht(dv),
                *strides_dbias, *strides_lse, **flags, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
