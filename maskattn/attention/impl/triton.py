"""impl "triton": every operation as the kernels of ``maskattn/kernels`` launch it.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from torch import Tensor

from maskattn.kernels.attention import backward, forward, masked
from maskattn.kernels.launch import arguments, support
from maskattn.kernels.readout import forward as readout
from maskattn.kernels.readout import gradient, relevance
from maskattn.operands import QKV, ClassGradients, KeySequences, Mask, Origins, Sequences
from maskattn.options import Options
from maskattn.results import Outputs, ReadoutOutputs

OPTIONS = arguments.OPTIONS
WITH_REST = arguments.WITH_REST
READS_OUTPUTS = True


supports = support.supports
packed_backward = backward.packed_backward
masked_backward = masked.masked_backward
readout_backward = gradient.readout_backward


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """Attention of packed sequences; lse costs nothing here."""
    return Outputs(*forward.packed_forward(qkv.q, qkv.k, qkv.v, where, options))


def masked_forward(qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
    """Attention of dense tensors over their kept keys; lse costs nothing here."""
    return masked.masked_forward(qkv, where, options)


def readout_forward(qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool) -> ReadoutOutputs:
    """Attention of a few queries of each sequence over its packed keys."""
    found = readout.readout_forward(qkv.q, qkv.k, qkv.v, where.cu_seqlens, where.max_seqlen, options, need_rows)
    return ReadoutOutputs(*found)


def token_relevance(
    qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """The relevance (K, T) of every token for every class."""
    given = classes.out, classes.lse, classes.grad_out, origins.key_origin, origins.value_origin
    return relevance.token_relevance(qkv.q, qkv.k, qkv.v, *given, where.cu_seqlens, where.max_seqlen, options)
