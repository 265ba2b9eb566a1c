"""impl "reference": the specification itself, and its derivatives by torch.

torch.func differentiates, because the body of a registered operation runs below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from maskattn.attention import reference
from maskattn.options import Gradients, Options, Sequences

__all__ = [
    "masked_backward",
    "masked_forward",
    "packed_backward",
    "packed_forward",
    "readout_backward",
    "readout_forward",
    "token_relevance",
]


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.packed_attention``; no rest, for the backward starts from the inputs."""
    out, lse = reference.packed_attention(q, k, v, sequences.cu_seqlens_q, sequences.cu_seqlens_k, options)
    return out, lse, lse.new_empty(0)


def packed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    sequences: Sequences,
    options: Options,
) -> Gradients:
    """Gradients of :func:`packed_forward`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        return reference.packed_attention(q, k, v, sequences.cu_seqlens_q, sequences.cu_seqlens_k, options)

    return _differentiate(attend, q, k, v, options, (grad_out, grad_lse))


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.masked_attention``."""
    out, lse = reference.masked_attention(q, k, v, keep, skip_queries, options)
    return out, lse, lse.new_empty(0)


def masked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    keep: Tensor,
    skip_queries: bool,
    options: Options,
) -> Gradients:
    """Gradients of :func:`masked_forward`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        return reference.masked_attention(q, k, v, keep, skip_queries, options)

    return _differentiate(attend, q, k, v, options, (grad_out, grad_lse))


def readout_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
    need_lse: bool,
    need_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.readout``; rows have no elements where unasked."""
    out, lse, rows = reference.readout(q, k, v, cu_seqlens, options)
    return out, lse, lse.new_empty(0), rows if need_rows else rows.new_empty((*rows.shape[:2], 0))


def readout_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Gradients:
    """Gradients of :func:`readout_forward`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, ...]:
        return reference.readout(q, k, v, cu_seqlens, options)

    return _differentiate(attend, q, k, v, options, (grad_out, grad_lse, grad_rows))


def token_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Tensor:
    """See ``reference.token_relevance``."""
    return reference.token_relevance(q, k, v, grad_out, key_origin, value_origin, cu_seqlens, options)


def _differentiate(
    attend: Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    grads_of_outputs: Sequence[Tensor | None],
) -> Gradients:
    differentiable = {"key_bias": options.key_bias, "slopes": options.slopes}
    present = {name: x for name, x in differentiable.items() if x is not None}

    def of_tensors(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(present, rest, strict=True))
        return attend(q, k, v, replace(options, key_bias=given.get("key_bias"), slopes=given.get("slopes")))

    outputs, pull_back = torch.func.vjp(of_tensors, q, k, v, *present.values())[:2]
    cotangents = (
        torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in zip(outputs, grads_of_outputs, strict=True)
    )
    dq, dk, dv, *rest = pull_back(tuple(cotangents))
    return Gradients(dq, dk, dv, **dict(zip(present, rest, strict=True)))
