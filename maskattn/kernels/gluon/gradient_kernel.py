"""The Gluon kernel of backward in one pass: a producer and two consumers for 128 keys of one head and sequence."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from maskattn.kernels.gluon.gradient_consumer import GradientRooms, differentiate_keys
from maskattn.kernels.gluon.pipeline import describe_rows, fetch_block, make_ring, stage_of
from maskattn.kernels.gluon.row_terms import first_row_step
from maskattn.kernels.language.tiles import sequence_bounds, tokens_base
from maskattn.kernels.launch.arguments import VARYING
from maskattn.kernels.launch.schedule import find_work

__all__ = ["BLOCK_N", "gluon_gradient_kernel"]

# Keys of a program, 64 for each of two consumers.
BLOCK_N = 128


@gluon.constexpr_function
def row_terms_layout():
    """Return the layout of one term of a block's queries in shared memory: plain."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@gluon.jit
def describe_row_terms(row_terms_ptr, steps, head, row_steps, first_step, TERMS: gl.constexpr, BLOCKS: gl.constexpr):
    """Make the descriptor of the terms of one sequence's queries and head, to be read 64 numbers at a time."""
    LAYOUT: gl.constexpr = row_terms_layout()
    OF_STEP: gl.constexpr = TERMS * BLOCKS * 64
    base_ptr = row_terms_ptr + (gl.cast(head, gl.int64) * row_steps + first_step) * OF_STEP
    return tma.make_tensor_descriptor(base_ptr, [gl.maximum(steps, 1) * OF_STEP], [1], [64], LAYOUT)


@gluon.jit
def fetch_query_block(
    q_desc, terms_desc, rooms, block, BLOCKS: gl.constexpr, STAGES: gl.constexpr, TERMS: gl.constexpr
):
    """Have the copy engine write a block of queries and their terms into their stage once that is empty."""
    BYTES: gl.constexpr = q_desc.block_type.nbytes + TERMS * terms_desc.block_type.nbytes
    stage, parity = stage_of(block, STAGES)
    full = rooms.q.full.index(stage)
    mbarrier.wait(rooms.q.empty.index(stage), parity ^ 1)
    mbarrier.expect(full, BYTES)
    tma.async_copy_global_to_shared(q_desc, [block * 64, 0], full, rooms.q.rows.index(stage))
    for term in gl.static_range(TERMS):
        begin = (block // BLOCKS * TERMS + term) * BLOCKS * 64 + block % BLOCKS * 64
        terms_room = rooms.row_terms.index(stage * TERMS + term)
        tma.async_copy_global_to_shared(terms_desc, [begin], full, terms_room)


@gluon.jit
def fetch_queries(
    k_base_ptr,
    v_base_ptr,
    q_base_ptr,
    dout_base_ptr,
    k_stride_t,
    v_stride_t,
    q_stride_t,
    dout_stride_t,
    row_terms_ptr,
    head,
    row_steps,
    first_step,
    keys_left,
    q_length,
    rooms,
    HEAD: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TERMS: gl.constexpr,
):
    """Run the producer: fetch the keys and values once, and all blocks of queries and of dO as they are consumed."""
    steps = (q_length + 64 * BLOCKS - 1) // (64 * BLOCKS)
    # Made by the warp that uses them: only the warp that makes a descriptor may rely on the copy engine seeing it.
    k_desc = describe_rows(k_base_ptr, keys_left, k_stride_t, rooms.k, HEAD)
    q_desc = describe_rows(q_base_ptr, q_length, q_stride_t, rooms.q, HEAD)
    terms_desc = describe_row_terms(row_terms_ptr, steps, head, row_steps, first_step, TERMS, BLOCKS)
    v_desc = describe_rows(v_base_ptr, keys_left, v_stride_t, rooms.v, HEAD)
    dout_desc = describe_rows(dout_base_ptr, q_length, dout_stride_t, rooms.dout, HEAD)
    for half in gl.static_range(2):
        fetch_block(k_desc, rooms.k, half, True, 64, 2)
        fetch_block(v_desc, rooms.v, half, True, 64, 2)
    # A step's last block may lie past the end, and is 0 then.
    for block in range(steps * BLOCKS):
        fetch_query_block(q_desc, terms_desc, rooms, block, BLOCKS, STAGES, TERMS)
        fetch_block(dout_desc, rooms.dout, block, True, 64, STAGES)


@gluon.jit(do_not_specialize=VARYING)
def gluon_gradient_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    dout_tokens,
    row_terms_ptr,
    row_steps,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dbias_tokens,
    dslopes_ptr,
    terms,
    q_bounds,
    k_bounds,
    heads,
    items_ptr,
    tiles,
    items,
    HEAD: gl.constexpr,
    PADDED: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TERMS: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    MASKS_ALL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Compute dk, dv and dbias of 128 keys, and add their part of dq, over all queries of their sequence."""
    tile, head, sequence, k_start, k_length, item = find_work(items_ptr, k_bounds, tiles, heads, 128)
    first = tile * 128
    if first >= k_length:
        return
    q_start, q_length = sequence_bounds(q_bounds.starts_ptr, q_bounds.ends_ptr, sequence)
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start + first, False)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start + first, False)
    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, False)
    dout_base_ptr = tokens_base(dout_tokens, sequence, head, q_start, False)
    if dslopes_ptr is not None:
        dslopes_ptr += (head * items + item) * 2
    DTYPE: gl.constexpr = q_tokens.ptr.dtype.element_ty
    # Each consumer computes one of the two blocks of a step's dQ, or half of the columns of its only block.
    COLUMNS: gl.constexpr = PADDED // (3 - BLOCKS)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    DQ_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, COLUMNS], gl.float32)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=2)
    rooms = GradientRooms(
        make_ring(DTYPE, PADDED, 64, 2, 2),
        make_ring(DTYPE, PADDED, 64, 2, 2),
        make_ring(DTYPE, PADDED, 64, STAGES, 2),
        make_ring(DTYPE, PADDED, 64, STAGES, 2),
        gl.allocate_shared_memory(gl.float32, [STAGES * TERMS, 64], row_terms_layout()),
        gl.allocate_shared_memory(DTYPE, [4 * BLOCKS, 64, 64], DS_LAYOUT),
        ready,
        gl.allocate_shared_memory(gl.float32, [2, 64, COLUMNS], DQ_LAYOUT),
    )
    gl.warp_specialize(
        [
            (
                differentiate_keys,
                (
                    rooms, dq_ptr, dk_ptr, dv_ptr, dbias_tokens, dslopes_ptr, terms, k_bounds, heads, items_ptr, tiles,
                    head, sequence, first, q_start, q_length, k_start, k_length - first, HEAD, 0, BLOCKS, STAGES, TERMS,
                    IN_REGISTERS, MASKS_ALL,
                ),
            ),
            (
                differentiate_keys,
                (
                    rooms, dq_ptr, dk_ptr, dv_ptr, dbias_tokens, dslopes_ptr, terms, k_bounds, heads, items_ptr, tiles,
                    head, sequence, first, q_start, q_length, k_start, k_length - first, HEAD, 1, BLOCKS, STAGES, TERMS,
                    IN_REGISTERS, MASKS_ALL,
                ),
            ),
            (
                fetch_queries,
                (
                    k_base_ptr, v_base_ptr, q_base_ptr, dout_base_ptr, k_tokens.stride_t, v_tokens.stride_t,
                    q_tokens.stride_t, dout_tokens.stride_t, row_terms_ptr, head, row_steps,
                    first_row_step(q_start, sequence, 64 * BLOCKS), k_length - first, q_length, rooms, HEAD, BLOCKS,
                    STAGES, TERMS,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
