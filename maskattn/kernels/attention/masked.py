"""Attention over the kept tokens of dense tensors, in one of two equivalent ways.

- *in place*: the kernels look up the positions of the kept rows and read them there;
- *moved*: the kept rows are moved to the front of their sequences, processed like packed rows, and moved back.

Look-ups cost index arithmetic in every tile and rule out the copy engine; moving costs a pass over q, k, v and the
output. The first cost grows with the square of the number of tokens and the second linearly, so long sequences are
moved.

Dimension key: B sequences, N tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskattn.kernels.attention.backward import completed, differentiate
from maskattn.kernels.attention.forward import attend
from maskattn.kernels.launch.arguments import empty_rest
from maskattn.kernels.launch.compaction import (
    from_front,
    front_rows,
    options_to_front,
    to_front,
    values_from_front,
    values_to_front,
)
from maskattn.kernels.launch.recording import allocate
from maskattn.kernels.launch.replay import replayed
from maskattn.kernels.launch.rows import Rows, every_row, kept_rows
from maskattn.operands import QKV, Mask
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients, Outputs

__all__ = ["MOVED_FROM", "masked_backward", "masked_forward"]

# Length of a sequence, in tokens, from which on the kept ones are moved. Not measured: published figures put the cost
# of packing at 12 % of the attention of 4,096 kept tokens and 3 % of 16,384, and f = 0.3 is common.
MOVED_FROM = 16_384


def masked_forward(qkv: QKV, mask: Mask, options: Options, moved_from: int = MOVED_FROM) -> Outputs:
    """Compute the attention over the kept tokens.

    Args:
        qkv: q (B, H, Nq, D) and k, v (B, H, N, D), any strides.
        mask: the tokens that take part.
        options: the options, in the shapes for dense tensors.
        moved_from: length of a sequence, in tokens, from which on the kept ones are moved.
    """
    if mask.keep.shape[1] < moved_from:
        return Outputs(*replayed(_forward_in_place, tuple(vars(qkv).values()), mask, options))
    q, k, v = vars(qkv).values()
    kept, every, skip_queries = *_rows_of(q, mask), mask.skip_queries
    front = front_rows(kept)
    own = options_to_front(options, kept if skip_queries else None, kept)
    q = to_front(q, kept) if skip_queries else q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rest = empty_rest(lse, options)
    attend(q, to_front(k, kept), to_front(v, kept), own, out, lse, rest, every or front, front)
    if skip_queries:
        rest = values_from_front(rest, kept, 0.0) if rest.ndim > 1 else rest
        return Outputs(from_front(out, kept), values_from_front(lse, kept, -math.inf), rest)
    return Outputs(out, lse, rest)


def _forward_in_place(qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, options: Options) -> tuple[Tensor, ...]:
    """Return out, lse and its rest."""
    q, k, v = qkv
    kept, every = _rows_of(q, mask)
    out = allocate(q.shape, q.dtype, q.device, fill=0)
    lse = allocate(q.shape[:3], torch.float32, q.device, fill=-math.inf)
    rest = empty_rest(lse, options, fill=0)
    attend(q, k, v, options, out, lse, rest, every or kept, kept)
    return out, lse, rest


def masked_backward(
    grads_out: OutputGradients,
    qkv: QKV,
    outputs: Outputs,
    mask: Mask,
    options: Options,
    moved_from: int = MOVED_FROM,
) -> Gradients:
    """Return contiguous gradients of :func:`masked_forward`; those of background tokens are 0.

    Args:
        grads_out: gradients of out (B, H, Nq, D), with any strides, and of lse (B, H, Nq).
        qkv, mask, options: the arguments of forward.
        outputs: the results of forward.
        moved_from: as in forward.
    """
    if mask.keep.shape[1] < moved_from:
        tensors = (*vars(qkv).values(), *vars(outputs).values(), *vars(grads_out).values())
        dq, dk, dv, dbias_BHN, dslopes = replayed(_backward_in_place, tensors, mask, options)
        grads = Gradients(dq, dk, dv)
    else:
        grads, dbias_BHN, dslopes = _moved_backward(grads_out, qkv, outputs, *_rows_of(qkv.q, mask), options)
    if dbias_BHN is not None and options.key_bias is not None and options.key_bias.ndim == 2:
        dbias_BHN = dbias_BHN.sum(1)
    return completed(grads, options, dbias_BHN, dslopes)


def _backward_in_place(tensors: tuple[Any, ...], mask: Mask, options: Options) -> tuple[Tensor | None, ...]:
    """Return dq, dk, dv, dbias per head, (B, H, N), and the terms of dslopes."""
    qkv, outputs, grads_out = QKV(*tensors[:3]), Outputs(*tensors[3:6]), OutputGradients(*tensors[6:])
    kept, every = _rows_of(qkv.q, mask)
    grads = Gradients(*(allocate(x.shape, x.dtype, x.device, fill=0) for x in tensors[:3]))
    dbias_BHN = _new_bias_gradient(qkv.k, options)
    dslopes = differentiate(grads_out, qkv, outputs, every or kept, kept, options, grads, dbias_BHN)
    return grads.q, grads.k, grads.v, dbias_BHN, dslopes


def _moved_backward(
    grads_out: OutputGradients, qkv: QKV, outputs: Outputs, kept: Rows, every: Rows | None, options: Options
) -> tuple[Gradients, Tensor | None, Tensor | None]:
    """Return the gradients of q, k and v, that of the bias per head (B, H, N), and the terms of dslopes."""
    front = front_rows(kept)
    own = options_to_front(options, kept if every is None else None, kept)
    q, lse, rest, grad_lse = qkv.q, outputs.lse, outputs.lse_rest, grads_out.grad_lse
    if every is None:
        q, out, grad_out = (to_front(x, kept) for x in (q, outputs.out, grads_out.grad_out))
        rest = values_to_front(rest, kept, 2) if rest.ndim > 1 else rest
        outputs = Outputs(out, values_to_front(lse, kept, 2), rest)
        grads_out = OutputGradients(grad_out, None if grad_lse is None else values_to_front(grad_lse, kept, 2))
    qkv = QKV(q, to_front(qkv.k, kept), to_front(qkv.v, kept))
    grads = Gradients(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in vars(qkv).values()))
    dbias_BHN = _new_bias_gradient(qkv.k, options)
    dslopes = differentiate(grads_out, qkv, outputs, every or front, front, own, grads, dbias_BHN)
    if dbias_BHN is not None:
        dbias_BHN = values_from_front(dbias_BHN, kept, 0.0)
    dq = from_front(grads.q, kept) if every is None else grads.q
    return replace(grads, q=dq, k=from_front(grads.k, kept), v=from_front(grads.v, kept)), dbias_BHN, dslopes


def _rows_of(q: Tensor, mask: Mask) -> tuple[Rows, Rows | None]:
    """Return the kept rows and, if all queries attend, the rows of all queries."""
    return kept_rows(mask.keep), None if mask.skip_queries else every_row(mask.keep, q.shape[2])


def _new_bias_gradient(k: Tensor, options: Options) -> Tensor | None:
    return None if options.key_bias is None else allocate(k.shape[:3], torch.float32, k.device, fill=0)
