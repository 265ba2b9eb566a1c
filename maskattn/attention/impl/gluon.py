"""impl "gluon": ``packed_attention`` by the Hopper kernel of ``maskattn/kernels/gluon``, chosen by name only.

No GPU has run it: it is simulated and compiled ahead of time. Its gradients are those of the Triton kernels, which read
what its forward leaves. Every other operation is refused.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from maskattn.kernels.attention import backward
from maskattn.kernels.gluon import support
from maskattn.kernels.launch import arguments
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

OPTIONS = frozenset({"scale", "key_bias", "slopes", "coords_q", "coords_k"})
WITH_REST = arguments.WITH_REST


def supports(q: Tensor, options: Options) -> str | None:
    """Why the kernel cannot run a call, as the end of a sentence that names it; None if it can."""
    return support.supports(q, options)


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences; lse costs nothing here."""
    # Gluon is not in every triton that the package runs with; ``supports`` says which.
    from maskattn.kernels.gluon import forward

    return Outputs(*forward.packed_forward(qkv.q, qkv.k, qkv.v, where, options))


def packed_backward(
    grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
) -> Gradients:
    """Gradients of :func:`packed_forward`, by the two passes of the Triton kernels."""
    return backward.packed_backward(
        grads.grad_out, grads.grad_lse, qkv.q, qkv.k, qkv.v, outputs.out, outputs.lse, outputs.lse_rest, where, options
    )


def masked_forward(qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
    """Refused, as :func:`supports` says before."""
    _refuse("masked_attention")


def masked_backward(grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Mask, options: Options) -> Gradients:
    """Refused."""
    _refuse("masked_attention")


def readout_forward(qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool) -> ReadoutOutputs:
    """Refused."""
    _refuse("readout")


def readout_backward(
    grads: ReadoutGradients, qkv: QKV, outputs: Outputs, where: KeySequences, options: Options
) -> Gradients:
    """Refused."""
    _refuse("readout")


def token_relevance(
    qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """Refused."""
    _refuse("token_relevance")


def _refuse(operation: str) -> NoReturn:
    raise ValueError(f"impl='gluon' computes packed_attention alone, got {operation}; pass impl=None or impl='triton'")
