"""impl "triton": every operation as the kernels of ``maskattn/kernels`` launch it.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from torch import Tensor

from maskattn.kernels.attention import backward, forward, masked
from maskattn.kernels.launch import arguments, support
from maskattn.kernels.readout import forward as readout
from maskattn.kernels.readout import gradient, relevance
from maskattn.operands import (
    QKV,
    ClassGradients,
    Gradients,
    KeySequences,
    Mask,
    Origins,
    OutputGradients,
    Outputs,
    ReadoutGradients,
    ReadoutOutputs,
    Sequences,
)
from maskattn.options import Options

__all__ = [
    "OPTIONS",
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

OPTIONS = arguments.OPTIONS
WITH_REST = arguments.WITH_REST


def supports(q: Tensor, options: Options) -> str | None:
    """Why the kernels cannot run a call, as the end of a sentence that names them; None if they can."""
    return support.supports(q, options)


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences; lse costs nothing here."""
    return Outputs(*forward.packed_forward(qkv.q, qkv.k, qkv.v, where, options))


def packed_backward(
    grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
) -> Gradients:
    """Gradients of :func:`packed_forward`."""
    return backward.packed_backward(
        grads.grad_out, grads.grad_lse, qkv.q, qkv.k, qkv.v, outputs.out, outputs.lse, outputs.lse_rest, where, options
    )


def masked_forward(qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
    """Attention of dense tensors over their kept keys; lse costs nothing here."""
    return Outputs(*masked.masked_forward(qkv.q, qkv.k, qkv.v, where.keep, where.skip_queries, options))


def masked_backward(grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Mask, options: Options) -> Gradients:
    """Gradients of :func:`masked_forward`, 0 at background positions."""
    return masked.masked_backward(
        grads.grad_out, grads.grad_lse, qkv.q, qkv.k, qkv.v, outputs.out, outputs.lse, outputs.lse_rest, where.keep,
        where.skip_queries, options,
    )  # fmt: skip


def readout_forward(qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool) -> ReadoutOutputs:
    """Attention of a few queries of each sequence over its packed keys."""
    found = readout.readout_forward(qkv.q, qkv.k, qkv.v, where.cu_seqlens, where.max_seqlen, options, need_rows)
    return ReadoutOutputs(*found)


def readout_backward(
    grads: ReadoutGradients, qkv: QKV, outputs: Outputs, where: KeySequences, options: Options
) -> Gradients:
    """Gradients of :func:`readout_forward`."""
    return gradient.readout_backward(
        grads.grad_out, grads.grad_lse, grads.grad_rows, qkv.q, qkv.k, qkv.v, outputs.out, outputs.lse,
        outputs.lse_rest, where.cu_seqlens, where.max_seqlen, options,
    )  # fmt: skip


def token_relevance(
    qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """The relevance (K, T) of every token for every class."""
    given = classes.out, classes.lse, classes.grad_out, origins.key_origin, origins.value_origin
    return relevance.token_relevance(qkv.q, qkv.k, qkv.v, *given, where.cu_seqlens, where.max_seqlen, options)
