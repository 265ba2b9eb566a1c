"""The launcher of the Hopper kernel for packed sequences, which no GPU has run: simulated and compiled ahead of time.

Dimension key: B sequences, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskattn.kernels.gluon.configs import choose
from maskattn.kernels.gluon.kernel import BLOCK_M, gluon_forward_kernel
from maskattn.kernels.launch.arguments import (
    bounds_argument,
    empty_rest,
    keeps_rest,
    rest_argument,
    row_values_argument,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.descriptors import describable, launch
from maskattn.kernels.launch.rows import Rows, packed_rows_of, readable
from maskattn.kernels.launch.schedule import plan_work
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.tables.lookup import padded_width
from maskattn.operands import Sequences
from maskattn.options import Options

__all__ = ["WARPS", "described", "packed_forward"]

# Warps of each consumer, a warp group; the producer has one more warp.
WARPS = 4


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention of packed sequences.

    Args:
        q: (Tq, H, D) in float16 or bfloat16, any strides.
        k, v: (Tk, H, D).
        sequences: the boundaries of the sequences.
        options: the options, in the shapes for packed tensors, without dropout.

    Returns:
        out (Tq, H, D) in q's dtype, lse (H, Tq) float32 and its rest.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    rest = empty_rest(lse, options)
    scale, natural = options.scale, keeps_rest(options)
    if scale < 0:
        # The kernel takes the maximum before scaling, which needs a scale of at least 0.
        q, scale = -q, -scale
    q_rows, k_rows = packed_rows_of(sequences, q, k)
    q, k, v = readable(q), described(k, k_rows), described(v, k_rows)
    config, heads = choose(q.shape[-1], options), q.shape[1]
    work = plan_work(q_rows, k_rows, BLOCK_M)
    launch(
        gluon_forward_kernel, work.items * heads, True, q, tokens_argument(q), tokens_argument(k), tokens_argument(v),
        tokens_argument(out), row_values_argument(lse), rest_argument(rest), terms_argument(options, True, natural,
        scale), bounds_argument(q_rows), bounds_argument(k_rows), heads, *work, HEAD=q.shape[-1],
        PADDED=padded_width(q.shape[-1]), BLOCK_N=config.block_n, STAGES=config.stages, UNROLL=config.unroll,
        CONSUMER_REGISTERS=config.consumer_registers, PRODUCER_REGISTERS=config.producer_registers, num_warps=WARPS,
    )  # fmt: skip
    of_queries = ((out, 0.0), (lse.T, float("-inf")), *((x.T, 0.0) for x in (rest,) if x.ndim == 2))
    clear_tail(sequences.cu_seqlens_q, sequences.max_seqlen_q, *of_queries)
    return out, lse, rest


def described(x: Tensor, rows: Rows) -> Tensor:
    """Return ``x`` itself, or a copy if the copy engine cannot read its rows."""
    return x if x.stride(-1) == 1 and describable(x, rows) else x.clone(memory_format=torch.contiguous_format)
