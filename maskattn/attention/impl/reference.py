"""impl "reference": the specification of ``maskattn/attention/reference.py``, with derivatives by torch.

Derivatives come from torch.func, because the body of a registered operation runs below autograd. Each backward starts
from the inputs, so the results of forward are not needed and lse has no rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskattn.attention import reference
from maskattn.operands import QKV, ClassGradients, KeySequences, Mask, Origins, Sequences
from maskattn.options import Options, differentiable
from maskattn.results import Gradients, OutputGradients, Outputs, ReadoutGradients, ReadoutOutputs

OPTIONS = reference.OPTIONS
WITH_REST: frozenset[str] = frozenset()
READS_OUTPUTS = False


def supports(q: Tensor, options: Options) -> str | None:
    """None: it runs everywhere."""
    return None


def packed_forward(qkv: QKV, where: Sequences, options: Options, need_lse: bool) -> Outputs:
    """See ``reference.packed_attention``."""
    out, lse = reference.packed_attention(qkv.q, qkv.k, qkv.v, where.cu_seqlens_q, where.cu_seqlens_k, options)
    return Outputs(out, lse, lse.new_empty(0))


def packed_backward(
    grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Sequences, options: Options
) -> Gradients:
    """Gradients of :func:`packed_forward`."""
    return _differentiate(lambda qkv, options: packed_forward(qkv, where, options, True), qkv, options, grads)


def masked_forward(qkv: QKV, where: Mask, options: Options, need_lse: bool) -> Outputs:
    """See ``reference.masked_attention``."""
    out, lse = reference.masked_attention(qkv.q, qkv.k, qkv.v, where.keep, where.skip_queries, options)
    return Outputs(out, lse, lse.new_empty(0))


def masked_backward(grads: OutputGradients, qkv: QKV, outputs: Outputs, where: Mask, options: Options) -> Gradients:
    """Gradients of :func:`masked_forward`."""
    return _differentiate(lambda qkv, options: masked_forward(qkv, where, options, True), qkv, options, grads)


def readout_forward(qkv: QKV, where: KeySequences, options: Options, need_lse: bool, need_rows: bool) -> ReadoutOutputs:
    """See ``reference.readout``."""
    out, lse, rows = reference.readout(qkv.q, qkv.k, qkv.v, where.cu_seqlens, options)
    return ReadoutOutputs(out, lse, lse.new_empty(0), rows if need_rows else rows.new_empty((*rows.shape[:2], 0)))


def readout_backward(
    grads: ReadoutGradients, qkv: QKV, outputs: Outputs, where: KeySequences, options: Options
) -> Gradients:
    """Gradients of :func:`readout_forward`."""
    return _differentiate(lambda qkv, options: readout_forward(qkv, where, options, True, True), qkv, options, grads)


def token_relevance(
    qkv: QKV, classes: ClassGradients, origins: Origins, where: KeySequences, options: Options
) -> Tensor:
    """See ``reference.token_relevance``."""
    given = classes.grad_out, origins.key_origin, origins.value_origin
    return reference.token_relevance(qkv.q, qkv.k, qkv.v, *given, where.cu_seqlens, options)


def _differentiate(
    attend: Callable[[QKV, Options], Outputs], qkv: QKV, options: Options, grads: OutputGradients
) -> Gradients:
    """Gradients of an operation from those of its outputs: out, lse and, for a readout, the rows."""
    learnt = {name: x for name in differentiable() if (x := getattr(options, name)) is not None}

    def of_tensors(q: Tensor, k: Tensor, v: Tensor, *of_options: Tensor) -> tuple[Tensor, ...]:
        own: dict[str, Any] = dict(zip(learnt, of_options, strict=True))
        found = vars(attend(QKV(q, k, v), replace(options, **own)))
        return tuple(x for name, x in found.items() if name != "lse_rest")

    outputs, pull_back = torch.func.vjp(of_tensors, qkv.q, qkv.k, qkv.v, *learnt.values())[:2]
    given = zip(outputs, vars(grads).values(), strict=True)
    cotangents = (torch.zeros_like(x) if grad is None else grad.to(x.dtype) for x, grad in given)
    dq, dk, dv, *rest = pull_back(tuple(cotangents))
    return Gradients(dq, dk, dv, **dict(zip(learnt, rest, strict=True)))
