"""The Gluon kernel: a producer and two consumers of 64 queries each, for one tile of queries, head and sequence."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from maskattn.kernels.gluon.consumer import attend_rows
from maskattn.kernels.gluon.pipeline import fetch_blocks, make_ring
from maskattn.kernels.language.tiles import sequence_bounds, tokens_base
from maskattn.kernels.launch.arguments import VARYING
from maskattn.kernels.launch.schedule import find_work

__all__ = ["BLOCK_M", "gluon_forward_kernel"]

# Queries of a tile, 64 for each of two consumers.
BLOCK_M = 128


@gluon.jit(do_not_specialize=VARYING)
def gluon_forward_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    out_tokens,
    lse_values,
    lse_rest_values,
    terms,
    q_bounds,
    k_bounds,
    heads,
    items_ptr,
    tiles,
    items,
    HEAD: gl.constexpr,
    PADDED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Compute the attention of one tile of queries over all keys of its sequence."""
    tile, head, sequence, q_start, q_length, _ = find_work(items_ptr, q_bounds, tiles, heads, 128)
    first = tile * 128
    if first >= q_length:
        return
    k_start, k_length = sequence_bounds(k_bounds.starts_ptr, k_bounds.ends_ptr, sequence)
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, False)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, False)
    DTYPE: gl.constexpr = q_tokens.ptr.dtype.element_ty
    k_ring = make_ring(DTYPE, PADDED, BLOCK_N, STAGES, 2)
    v_ring = make_ring(DTYPE, PADDED, BLOCK_N, STAGES, 2)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, PADDED], DTYPE)
    q_rows = gl.allocate_shared_memory(DTYPE, [2, 64, PADDED], Q_LAYOUT)
    gl.warp_specialize(
        [
            (
                attend_rows,
                (
                    q_rows.index(0), k_ring, v_ring, q_tokens, out_tokens, lse_values, lse_rest_values, terms, head,
                    sequence, first, q_start, q_length, k_start, k_length, HEAD, BLOCK_N, STAGES, UNROLL,
                ),
            ),
            (
                attend_rows,
                (
                    q_rows.index(1), k_ring, v_ring, q_tokens, out_tokens, lse_values, lse_rest_values, terms, head,
                    sequence, first + 64, q_start, q_length, k_start, k_length, HEAD, BLOCK_N, STAGES, UNROLL,
                ),
            ),
            (
                fetch_blocks,
                (
                    k_base_ptr, v_base_ptr, k_tokens.stride_t, v_tokens.stride_t, k_length, k_ring, v_ring, HEAD,
                    BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
