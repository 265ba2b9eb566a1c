"""The launcher of backward in one pass on Hopper, which no GPU has run: simulated and compiled ahead of time.

Per pair of tiles it multiplies five times, S = QKᵀ, dP = dO Vᵀ, dV += Pᵀ dO, dK += dSᵀ Q and dQ += dS K, where two
passes multiply seven times. dQ is summed over the tiles of keys in float32 by the copy engine's additions to global
memory, which come in any order: dq differs in its last bits from run to run. ``kernels/attention/backward.py`` defines
the symbols.

Dimension key: Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.kernels.attention.backward import completed
from maskattn.kernels.gluon.configs import GradientConfig
from maskattn.kernels.gluon.forward import WARPS, described
from maskattn.kernels.gluon.gradient_kernel import BLOCK_N, gluon_gradient_kernel
from maskattn.kernels.gluon.row_terms import row_terms_kernel
from maskattn.kernels.language.bundles import ABSENT, Tokens
from maskattn.kernels.launch.arguments import (
    bounds_argument,
    keeps_rest,
    known_strides,
    rest_argument,
    row_values_argument,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.descriptors import launch
from maskattn.kernels.launch.rows import Rows, packed_rows_of, readable
from maskattn.kernels.launch.schedule import Work, plan_work
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.tables.lookup import padded_width
from maskattn.operands import QKV, Sequences
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients, Outputs

__all__ = ["packed_backward"]


def packed_backward(
    grads_out: OutputGradients,
    qkv: QKV,
    outputs: Outputs,
    sequences: Sequences,
    options: Options,
    config: GradientConfig,
) -> Gradients:
    """Return contiguous gradients of :func:`maskattn.kernels.gluon.forward.packed_forward`.

    Args:
        grads_out: gradients of out (Tq, H, D), with any strides, and of lse (H, Tq).
        qkv, sequences, options: the arguments of forward.
        outputs: the results of forward.
        config: the configuration, of ``choose_gradient``.
    """
    heads, width, device = qkv.q.shape[1], qkv.q.shape[2], qkv.q.device
    grads = Gradients(*(torch.empty(x.shape, dtype=x.dtype, device=device) for x in vars(qkv).values()))
    q_rows, k_rows = packed_rows_of(sequences, qkv.q, qkv.k)
    terms = 3 if keeps_rest(options) else 2
    step = 64 * config.blocks
    row_terms = _row_terms(grads_out, outputs, q_rows, plan_work(q_rows, k_rows, step), terms, step)
    work = plan_work(k_rows, q_rows, BLOCK_N)
    sum_of_dq = torch.zeros(qkv.q.shape, dtype=torch.float32, device=device)
    dbias_HT = None
    if options.key_bias is not None:
        # Contiguous as (Tk, H) if that is the shape of the bias.
        per_head = options.key_bias.ndim == 2
        tokens = qkv.k.shape[0]
        dbias = torch.empty((tokens, heads) if per_head else (heads, tokens), dtype=torch.float32, device=device)
        dbias_HT = dbias.T if per_head else dbias
    parts_of_dslopes = None
    if options.slopes is not None:
        parts_of_dslopes = torch.zeros(heads, work.items, 2, dtype=torch.float32, device=device)
    q, grad_out = described(readable(qkv.q), q_rows), described(readable(grads_out.grad_out), q_rows)
    k, v = described(qkv.k, k_rows), described(qkv.v, k_rows)
    launch(
        gluon_gradient_kernel, work.items * heads, True, q, tokens_argument(q), tokens_argument(k), tokens_argument(v),
        tokens_argument(grad_out), row_terms, row_terms.shape[1], sum_of_dq, grads.k, grads.v,
        _dbias_argument(dbias_HT), parts_of_dslopes, terms_argument(options, True, keeps_rest(options)),
        bounds_argument(q_rows), bounds_argument(k_rows), heads, *work, HEAD=width, PADDED=padded_width(width),
        BLOCKS=config.blocks, STAGES=config.stages, TERMS=terms, IN_REGISTERS=config.in_registers,
        MASKS_ALL=config.masks_all, CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers, num_warps=WARPS,
    )  # fmt: skip
    torch.mul(sum_of_dq, options.scale, out=grads.q)
    of_keys = [(x, 0.0) for x in (grads.k, grads.v, None if dbias_HT is None else dbias_HT.T) if x is not None]
    clear_tail(sequences.cu_seqlens_q, sequences.max_seqlen_q, (grads.q, 0.0))
    clear_tail(sequences.cu_seqlens_k, sequences.max_seqlen_k, *of_keys)
    if dbias_HT is not None:
        dbias_HT = dbias_HT.T if per_head else dbias_HT.sum(0)
    return completed(grads, options, dbias_HT, None if parts_of_dslopes is None else parts_of_dslopes.flatten(1))


def _row_terms(grads_out: OutputGradients, outputs: Outputs, rows: Rows, work: Work, terms: int, step: int) -> Tensor:
    """(H, steps, terms, step) float32; ``row_terms.py`` says what they are."""
    out, grad_out, lse = readable(outputs.out), readable(grads_out.grad_out), outputs.lse.contiguous()
    grad_lse = None if grads_out.grad_lse is None else grads_out.grad_lse.contiguous()
    tokens, heads, width = out.shape
    row_terms = lse.new_empty(heads, tokens // step + rows.batch, terms, step)
    launch(
        row_terms_kernel, work.items * heads, False, out, tokens_argument(out), tokens_argument(grad_out),
        row_values_argument(lse), rest_argument(outputs.lse_rest.contiguous()), row_values_argument(grad_lse),
        row_terms, row_terms.shape[1], bounds_argument(rows), heads, *work, HEAD=width, PADDED=padded_width(width),
        STEP=step, TERMS=terms, num_warps=WARPS,
    )  # fmt: skip
    return row_terms


def _dbias_argument(dbias_HT: Tensor | None) -> Tokens:
    return ABSENT if dbias_HT is None else Tokens(dbias_HT, *known_strides(0, *dbias_HT.stride()))
