"""The kernel: two consumers of 64 queries each and a producer, for one tile of queries, head and sequence."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from maskattn.kernels.gluon.consumer import attend_rows
from maskattn.kernels.gluon.pipeline import fetch_blocks, make_ring
from maskattn.kernels.language.tiles import sequence_bounds, tokens_base
from maskattn.kernels.launch.arguments import VARYING
from maskattn.kernels.launch.schedule import find_work

__all__ = ["BLOCK_M", "gluon_forward_kernel"]

# Queries of a tile: two consumers of 64.
BLOCK_M = 128


@gluon.jit
def describe_rows(base_ptr, length, stride_t, HEAD: gl.constexpr, PADDED: gl.constexpr, BLOCK_N: gl.constexpr):
    """The descriptor of the rows of one sequence and head; what lies past its end, or past D, is read as 0."""
    DTYPE: gl.constexpr = base_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, PADDED], DTYPE)
    # A descriptor may not be empty.
    return tma.make_tensor_descriptor(base_ptr, [gl.maximum(length, 1), HEAD], [stride_t, 1], [BLOCK_N, PADDED], LAYOUT)


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
    """Attention of one tile of queries over all keys of its sequence."""
    tile, head, sequence, q_start, q_length, _ = find_work(items_ptr, q_bounds, tiles, heads, 128)
    first = tile * 128
    if first >= q_length:
        return
    k_start, k_length = sequence_bounds(k_bounds.starts_ptr, k_bounds.ends_ptr, sequence)
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, False)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, False)
    k_desc = describe_rows(k_base_ptr, k_length, k_tokens.stride_t, HEAD, PADDED, BLOCK_N)
    v_desc = describe_rows(v_base_ptr, k_length, v_tokens.stride_t, HEAD, PADDED, BLOCK_N)
    k_ring = make_ring(k_desc, STAGES, 2)
    v_ring = make_ring(v_desc, STAGES, 2)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, PADDED], k_desc.dtype)
    q_rows = gl.allocate_shared_memory(k_desc.dtype, [2, 64, PADDED], Q_LAYOUT)
    blocks = (k_length + BLOCK_N - 1) // BLOCK_N
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
            (fetch_blocks, (k_desc, v_desc, k_ring, v_ring, blocks, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
