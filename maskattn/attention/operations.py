"""The attention operations, each registered with ``torch.library`` under its name.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width, K classes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from maskattn.attention.checks import check_lengths
from maskattn.attention.impl.torch.blocks import rest_of_lse
from maskattn.attention.impl.torch.tangents import masked_tangent, packed_tangent, readout_tangent
from maskattn.attention.implementation import implementation
from maskattn.attention.ops import Operation, register, register_without_derivative
from maskattn.operands import QKV, ClassGradients, KeySequences, Mask, Origins, Sequences
from maskattn.options import Options
from maskattn.results import OutputGradients, Outputs, ReadoutGradients, ReadoutOutputs

__all__ = ["PACKED", "is_large", "masked_attention", "packed_attention", "readout", "token_relevance"]

LARGE_LSE = 128.0


def _check_sequences(qkv: QKV, where: Sequences) -> None:
    of_queries = where.cu_seqlens_q, qkv.q.shape[0], where.max_seqlen_q
    of_keys = where.cu_seqlens_k, qkv.k.shape[0], where.max_seqlen_k
    check_lengths("cu_seqlens_q", *of_queries)
    # Self-attention passes the same lengths twice; checking them once saves time in small calls.
    if of_keys[0] is not of_queries[0] or of_keys[1:] != of_queries[1:]:
        check_lengths("cu_seqlens_k", *of_keys)


def _check_nothing(qkv: QKV, where: Mask) -> None:
    """A mask of the right shape and dtype has no further rules."""


def _check_key_sequences(qkv: QKV, where: KeySequences) -> None:
    check_lengths("cu_seqlens", where.cu_seqlens, qkv.k.shape[0], where.max_seqlen)


PACKED = Operation(
    name="packed_attention",
    where=Sequences,
    asked=("lse",),
    outputs=Outputs,
    gradients=OutputGradients,
    forward=lambda impl: impl.packed_forward,
    backward=lambda impl: impl.packed_backward,
    tangent=packed_tangent,
    lse_shape=lambda q: (q.shape[1], q.shape[0]),
    check=_check_sequences,
)
packed_attention = register(PACKED)

masked_attention = register(
    Operation(
        name="masked_attention",
        where=Mask,
        asked=("lse",),
        outputs=Outputs,
        gradients=OutputGradients,
        forward=lambda impl: impl.masked_forward,
        backward=lambda impl: impl.masked_backward,
        tangent=masked_tangent,
        lse_shape=lambda q: tuple(q.shape[:3]),
        check=_check_nothing,
    )
)

readout = register(
    Operation(
        name="readout",
        where=KeySequences,
        asked=("lse", "rows"),
        outputs=ReadoutOutputs,
        gradients=ReadoutGradients,
        forward=lambda impl: impl.readout_forward,
        backward=lambda impl: impl.readout_backward,
        tangent=readout_tangent,
        lse_shape=lambda q: tuple(q.shape[:3]),
        check=_check_key_sequences,
    )
)


def _run_relevance(
    impl: str, qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """S (K, T), float32 or wider."""
    _check_key_sequences(qkv, where)
    if impl != "reference" and is_large(classes.lse):
        # Relevance is linear in each query's gradients, so these can absorb the factor by which its weights are off.
        factor = rest_of_lse(qkv, classes.lse, where, options).neg().exp()[..., None]
        classes = replace(classes, grad_out=(classes.grad_out * factor).to(classes.grad_out.dtype))
    return implementation(impl).token_relevance(qkv, classes, origins, where, options)


def is_large(lse: Tensor) -> bool:
    """Whether weights from a float32 lse alone would be inaccurate; False on a device that would have to be awaited."""
    return lse.device.type == "cpu" and bool((lse.abs().masked_fill(lse.isinf(), 0) > LARGE_LSE).any())


token_relevance = register_without_derivative(
    "token_relevance",
    (QKV, ClassGradients, Origins, KeySequences),
    _run_relevance,
    lambda qkv, classes, *_: (classes.grad_out.shape[0], qkv.k.shape[0]),
    "token_relevance has no derivative, got one requested by torch.func or forward-mode AD; detach its inputs, or use "
    "token_relevance of maskattn.attention.reference, which torch can differentiate",
)
