"""impl "triton": every operation as the kernels of this folder launch it.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from torch import Tensor

from maskattn.kernels import forward, masked
from maskattn.kernels import readout as readout_kernels
from maskattn.kernels.backward import packed_backward
from maskattn.kernels.masked import masked_backward
from maskattn.kernels.readout_gradient import readout_backward
from maskattn.kernels.relevance import token_relevance
from maskattn.options import Options, Sequences

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
    """out, lse, which costs nothing here, and its rest."""
    return forward.packed_forward(q, k, v, sequences, options)


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, skip_queries: bool, options: Options, need_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, which costs nothing here, and its rest."""
    return masked.masked_forward(q, k, v, keep, skip_queries, options)


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
    """out, lse, its rest, and rows where asked."""
    return readout_kernels.readout_forward(q, k, v, cu_seqlens, max_seqlen, options, need_rows)
