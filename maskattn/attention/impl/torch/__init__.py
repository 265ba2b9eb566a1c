"""impl "torch": every operation in torch's own functions, on any device and without compiled code.

The backward functions start from the inputs, as torch's own do, and need no results of forward; lse has no rest.

Dimension key: B sequences, N grid tokens, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskattn.attention.impl.torch import sdpa
from maskattn.attention.impl.torch.blocks import attend_in_blocks, differentiate_in_blocks
from maskattn.attention.impl.torch.dense import DensePacking, gather
from maskattn.attention.impl.torch.relevance import token_relevance
from maskattn.attention.impl.torch.scores import OPTIONS, as_packed, wide_dtype
from maskattn.attention.impl.torch.sdpa import packed_forward
from maskattn.operands import QKV, KeySequences, Mask, Sequences
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients, Outputs, ReadoutGradients, ReadoutOutputs

__all__ = [
    "OPTIONS",
    "READS_OUTPUTS",
    "WITH_REST",
    "masked_backward",
    "masked_forward",
    "packed_backward",
    "packed_forward",
    "readout_backward",
    "readout_forward",
    "supports",
    "token_relevance",
]

WITH_REST: frozenset[str] = frozenset()
READS_OUTPUTS = False


def supports(q: Tensor, options: Options) -> str | None:
    """None: it runs everywhere."""
    return None


def packed_backward(
    grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
) -> Gradients:
    """Gradients of :func:`packed_forward`."""
    return sdpa.packed_backward(grads, qkv, where, options)


def masked_forward(qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
    """Attention of dense tensors over their kept keys: pack, attend, unpack."""
    packing, shape = DensePacking.of(qkv.q, where), tuple(qkv.q.shape)
    found = packed_forward(packing.packed(qkv), packing.sequences, packing.packed_options(options), need_lse)
    lse = packing.dense_lse(found.lse, shape) if need_lse else found.lse.new_empty((*shape[:2], 0))
    return Outputs(packing.dense_out(found.out, shape), lse, found.lse_rest)


def masked_backward(grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Mask, options: Options) -> Gradients:
    """Gradients of :func:`masked_forward`, 0 at background positions."""
    packing = DensePacking.of(qkv.q, where)
    grad_lse = None if grads.grad_lse is None else gather(grads.grad_lse[..., None], packing.queries)[..., 0].T
    own = OutputGradients(gather(grads.grad_out, packing.queries), grad_lse)
    found = sdpa.packed_backward(own, packing.packed(qkv), packing.sequences, packing.packed_options(options))
    return packing.dense_gradients(found, qkv, options)


def readout_forward(qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool) -> ReadoutOutputs:
    """Attention of a few queries of each sequence over its packed keys."""
    (B, R, H, _), T = qkv.q.shape, qkv.k.shape[0]
    rows = torch.zeros((R, H, T if need_rows else 0), dtype=wide_dtype(qkv.q), device=qkv.q.device)
    none = rows.new_empty(0)
    if not (need_lse or need_rows):
        out = packed_forward(*as_packed(qkv, where, options), False).out
        return ReadoutOutputs(out.view(qkv.q.shape), rows.new_empty((B, R, 0)), none, rows)
    out, lse = attend_in_blocks(*as_packed(qkv, where, options), rows if need_rows else None)
    return ReadoutOutputs(out.view(qkv.q.shape), lse.view(H, B, R).permute(1, 2, 0).contiguous(), none, rows)


def readout_backward(
    grads: ReadoutGradients, qkv: QKV, outputs: Outputs, where: KeySequences, options: Options
) -> Gradients:
    """Gradients of :func:`readout_forward`."""
    grad_lse = None if grads.grad_lse is None else grads.grad_lse.flatten(0, 1).T
    own, given = OutputGradients(grads.grad_out.flatten(0, 1), grad_lse), as_packed(qkv, where, options)
    if grads.grad_rows is None:
        found = sdpa.packed_backward(own, *given)
    else:
        found = differentiate_in_blocks(own.grad_out, own.grad_lse, *given, grads.grad_rows)
    return replace(found, q=found.q.view(qkv.q.shape))
