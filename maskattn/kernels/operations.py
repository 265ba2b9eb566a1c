"""impl "triton": every operation as the kernels of this folder launch it.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from torch import Tensor

from maskattn.kernels import backward, forward, masked, readout_gradient
from maskattn.kernels import readout as readout_kernels
from maskattn.kernels.relevance import token_relevance
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
    """out, lse, which costs nothing here, and no rest of it."""
    out, lse = forward.packed_forward(q, k, v, sequences, options)
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
    return backward.packed_backward(grad_out, grad_lse, q, k, v, out, lse, sequences, options)


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, which costs nothing here, and no rest of it."""
    out, lse = masked.masked_forward(q, k, v, keep, skip_queries, options)
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
    return masked.masked_backward(grad_out, grad_lse, q, k, v, out, lse, keep, skip_queries, options)


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
    """out, lse, no rest of it, and rows where asked."""
    out, lse, rows = readout_kernels.readout_forward(q, k, v, cu_seqlens, max_seqlen, options, need_rows)
    return out, lse, lse.new_empty(0), rows


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
    return readout_gradient.readout_backward(
        grad_out, grad_lse, grad_rows, q, k, v, out, lse, cu_seqlens, max_seqlen, options
    )
