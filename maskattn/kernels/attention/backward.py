"""Backward attention, with P recomputed from the row sums that forward left (FlashAttention-2, algorithm 2).

With dO and dlse the gradients of the outputs, s the scale, m the dropout factors and x the positions:

    delta_i = Σ_d dO_id out_id − dlse_i       dS_ij = p_ij (m_ij dO_i·v_j − delta_i)

    dq_i = s Σ_j dS_ij k_j    dk_j = s Σ_i dS_ij q_i    dv_j = Σ_i m_ij p_ij dO_i    dbias_j = Σ_i dS_ij

    dslope = −Σ_ij dS_ij ‖x_i − x_j‖

Two passes without atomics, so that the result is the same every time: one program per tile of queries for dq and parts
of dslope (it also leaves delta and lse in units of the scores), then one per tile of keys for dk, dv and dbias.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width; M queries and N keys
of a tile.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskattn.kernels.attention.key_gradient import key_gradient_kernel
from maskattn.kernels.attention.query_gradient import query_gradient_kernel
from maskattn.kernels.language.bundles import ABSENT, Tokens
from maskattn.kernels.launch.arguments import (
    bounds_argument,
    constant_arguments,
    keeps_rest,
    known_strides,
    rest_argument,
    row_values_argument,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.descriptors import describable, launch
from maskattn.kernels.launch.rows import Rows, packed_rows_of, readable
from maskattn.kernels.launch.schedule import plan_work
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.tables.lookup import choose
from maskattn.operands import QKV, Sequences
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients, Outputs

__all__ = ["completed", "differentiate", "packed_backward"]


def packed_backward(
    grads_out: OutputGradients, qkv: QKV, outputs: Outputs, sequences: Sequences, options: Options
) -> Gradients:
    """Contiguous gradients of :func:`maskattn.kernels.attention.forward.packed_forward`.

    Args:
        grads_out: of out (Tq, H, D), with any strides, and of lse (H, Tq).
        qkv, sequences, options: what forward was given.
        outputs: what forward returned.
    """
    k = qkv.k
    grads = Gradients(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in vars(qkv).values()))
    dbias_HT = None
    if options.key_bias is not None:
        # Contiguous as (Tk, H) where that is the bias's own shape.
        per_head = options.key_bias.ndim == 2
        shape = k.shape[:2] if per_head else (k.shape[1], k.shape[0])
        dbias = torch.empty(shape, dtype=torch.float32, device=k.device)
        dbias_HT = dbias.T if per_head else dbias
    rows = packed_rows_of(sequences, qkv.q, k)
    dslopes = differentiate(grads_out, qkv, outputs, *rows, options, grads, dbias_HT)
    of_keys = [(x, 0.0) for x in (grads.k, grads.v, dbias_HT if dbias_HT is None else dbias_HT.T) if x is not None]
    clear_tail(sequences.cu_seqlens_q, sequences.max_seqlen_q, (grads.q, 0.0))
    clear_tail(sequences.cu_seqlens_k, sequences.max_seqlen_k, *of_keys)
    if dbias_HT is not None:
        dbias_HT = dbias_HT.T if per_head else dbias_HT.sum(0)
    return completed(grads, options, dbias_HT, dslopes)


def completed(grads: Gradients, options: Options, dbias: Tensor | None, dslopes: Tensor | None) -> Gradients:
    """With the gradients of the options, summed in float32, in their dtypes."""
    if dbias is not None and options.key_bias is not None:
        grads = replace(grads, key_bias=dbias.to(options.key_bias.dtype))
    if dslopes is not None and options.slopes is not None:
        grads = replace(grads, slopes=dslopes.to(options.slopes.dtype))
    return grads


def differentiate(
    grads_out: OutputGradients,
    qkv: QKV,
    outputs: Outputs,
    q_rows: Rows,
    k_rows: Rows,
    options: Options,
    grads: Gradients,
    dbias: Tensor | None,
) -> Tensor | None:
    """Fill dq, dk, dv and dbias, which is a view of (H, Tk) or (B, H, N); returns dslopes."""
    q, k, v, out, grad_out = (readable(x) for x in (*vars(qkv).values(), outputs.out, grads_out.grad_out))
    lse, grad_lse = outputs.lse.contiguous(), grads_out.grad_lse
    delta, scaled_lse = torch.empty_like(lse), torch.empty_like(lse)
    rest = rest_argument(outputs.lse_rest.contiguous())
    head_width, heads = q.shape[-1], q.shape[1]
    inputs = tuple(tokens_argument(x) for x in (q, k, v))
    common = (
        terms_argument(options, packed=q.ndim == 3, natural=keeps_rest(options)),
        bounds_argument(q_rows),
        bounds_argument(k_rows),
        options.scale,
    )
    left = row_values_argument(delta), row_values_argument(scaled_lse)

    config = choose("query_gradient", q, options)
    work = plan_work(q_rows, k_rows, config.block_m)
    parts_of_dslopes = None
    if options.slopes is not None:
        parts_of_dslopes = torch.zeros(heads, work.items, dtype=torch.float32, device=q.device)
    described = config.descriptors and describable(k, k_rows) and describable(v, k_rows)
    launch(
        query_gradient_kernel, work.items * heads, described, q, *inputs, tokens_argument(out),
        row_values_argument(lse), rest, tokens_argument(grad_out),
        row_values_argument(None if grad_lse is None else grad_lse.contiguous()), tokens_argument(grads.q),
        parts_of_dslopes, *left, *common, heads, *work, **constant_arguments(head_width, config, described),
    )  # fmt: skip

    config = choose("key_gradient", q, options)
    work = plan_work(k_rows, q_rows, config.block_n)
    described = config.descriptors and describable(q, q_rows) and describable(grad_out, q_rows)
    launch(
        key_gradient_kernel, work.items * heads, described, q, *inputs, left[1], rest, tokens_argument(grad_out),
        left[0], tokens_argument(grads.k), tokens_argument(grads.v), _dbias_argument(dbias), *common, heads, *work,
        **constant_arguments(head_width, config, described),
    )  # fmt: skip
    return None if parts_of_dslopes is None else parts_of_dslopes.sum(1)


def _dbias_argument(dbias: Tensor | None) -> Tokens:
    """Of a (H, Tk) or (B, H, N) tensor."""
    if dbias is None:
        return ABSENT
    return Tokens(dbias, *known_strides(*((0, *dbias.stride()) if dbias.ndim == 2 else dbias.stride())))
