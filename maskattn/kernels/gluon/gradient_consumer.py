"""The computation of one warp group in backward: the gradients of 64 keys, and of half of each block's queries.

For each block of queries a warp group computes the transposed scores Sᵀ and dPᵀ of its 64 keys, and adds to its own
dV and dK. For dQ, which sums over the keys of both groups, both write dSᵀ to shared memory. After each *step* of one or
two blocks, each group computes one half of the step's dQ over all 128 keys, and has the copy engine add it to global
memory: one of the two blocks, or half of the columns of the only one.

Dimension key: N = 64 keys of a warp group, M = 64 queries of a block, D head width padded to a power of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from maskattn.kernels.gluon.consumer import accumulator_layout, store_outputs
from maskattn.kernels.gluon.pipeline import hand_back, wait_for_block
from maskattn.kernels.gluon.reduction import add_to_global
from maskattn.kernels.gluon.row_terms import DELTA, LSE, REST
from maskattn.kernels.language.scores import begin_scores, gradient_of_terms, key_terms, query_terms, scores
from maskattn.kernels.language.tiles import LN_2, LOG2_E, store_row_values, tokens_base
from maskattn.kernels.launch.schedule import find_work

__all__ = ["GradientRooms", "differentiate_keys"]


class GradientRooms(NamedTuple):
    """Shared memory of a program.

    Attributes:
        k, v: rings whose two stages hold the keys and values of each consumer; they are filled once.
        q, dout: rings of the blocks of queries and of the gradients of their outputs.
        row_terms: the terms of each stage's queries, [stages · terms, M] float32; they come and go with the queries.
        ds: dSᵀ, [4 · blocks of a step, N, M]: of each block of two steps, the part of each consumer.
        ready: a barrier that completes once both consumers have written their dSᵀ of a step.
        dq: the half of a step's dQ that each consumer computes, [2, 64, columns] float32.
    """

    k: Any
    v: Any
    q: Any
    dout: Any
    row_terms: Any
    ds: Any
    ready: Any
    dq: Any


@gluon.jit
def gradient_base(ptr, start, head, heads, HEAD: gl.constexpr):
    """Return the pointer to the first row of a sequence and head of a contiguous gradient (T, H, D)."""
    return ptr + (gl.cast(start, gl.int64) * heads + head) * HEAD


@gluon.jit
def describe_query_gradient(base_ptr, length, stride_t, rooms, HEAD: gl.constexpr):
    """Make the descriptor of the rows of dQ of one sequence and head; elements past its end, or past D, stay as is."""
    COLUMNS: gl.constexpr = rooms.dq.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, COLUMNS], gl.float32)
    # A descriptor may not be empty.
    return tma.make_tensor_descriptor(base_ptr, [gl.maximum(length, 1), HEAD], [stride_t, 1], [64, COLUMNS], LAYOUT)


@gluon.jit
def load_row_term(rooms, block, TERM: gl.constexpr, STAGES: gl.constexpr, TERMS: gl.constexpr):
    """Load one term of a block's queries, [M]."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, accumulator_layout(64))
    return rooms.row_terms.index(block % STAGES * TERMS + TERM).load(LAYOUT)


@gluon.jit
def room_of(block, consumer, BLOCKS: gl.constexpr):
    """Return the room of a consumer's dSᵀ of a block."""
    return block % (2 * BLOCKS) * 2 + consumer


@gluon.jit
def multiply_keys(rooms, step, CONSUMER: gl.constexpr, BLOCKS: gl.constexpr):
    """Start this consumer's half of dQ of a step, [64, columns], over the keys of both."""
    COLUMNS: gl.constexpr = rooms.dq.shape[2]
    block = step * 2 + CONSUMER if BLOCKS == 2 else step
    dq = gl.full([64, COLUMNS], 0.0, gl.float32, accumulator_layout(COLUMNS))
    for half in gl.static_range(2):
        ds = rooms.ds.index(room_of(block, half, BLOCKS))
        k = rooms.k.rows.index(half)
        if BLOCKS == 1:
            k = k.slice(COLUMNS * CONSUMER, COLUMNS, 1)
        dq = hopper.warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def add_query_gradient(dq, rooms, dq_desc, step, CONSUMER: gl.constexpr, BLOCKS: gl.constexpr):
    """Have the copy engine add this consumer's half of dQ of a step to global memory."""
    dq_rows = rooms.dq.index(CONSUMER)
    # The step before may still be on its way.
    tma.store_wait(0)
    dq_rows.store(dq)
    hopper.fence_async_shared()
    if BLOCKS == 2:
        add_to_global(dq_desc, [step * 128 + 64 * CONSUMER, 0], dq_rows)
    else:
        add_to_global(dq_desc, [step * 64, dq_rows.shape[1] * CONSUMER], dq_rows)


@gluon.jit
def differentiate_scores(
    products,
    differentiating,
    rooms,
    scoring,
    of_keys,
    of_queries,
    inside_keys,
    block,
    STAGES: gl.constexpr,
    TERMS: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Return the weights P and the gradients of the scores and of their terms; all are [N, M]."""
    score = scores(products, scoring, of_queries, of_keys, True)
    # Queries past the end have lse +inf, hence p = 0.
    excess = score.tile - load_row_term(rooms, block, LSE, STAGES, TERMS)[None, :]
    if TERMS == 3:
        p = gl.exp2(excess * LOG2_E - load_row_term(rooms, block, REST, STAGES, TERMS)[None, :])
    else:
        p = gl.exp2(excess)
    if PARTIAL:
        # 2^(0 − lse) may be inf, and inf · 0 is NaN.
        p = gl.where(inside_keys[:, None], p, 0.0)
    dp = hopper.warpgroup_mma_wait(0, deps=(differentiating,))
    ds = p * (dp - load_row_term(rooms, block, DELTA, STAGES, TERMS)[None, :])
    return p, ds, gradient_of_terms(score, ds)


@gluon.jit
def differentiate_block(
    dk,
    dv,
    dbias,
    dslope,
    k,
    v,
    rooms,
    scoring,
    of_keys,
    inside_keys,
    dq_desc,
    block,
    q_length,
    CONSUMER: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TERMS: gl.constexpr,
    ENDS_STEP: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Return dk + dSᵀ·Q, dv + Pᵀ·dO, dbias + Σ dSᵀ and dslope − Σ dSᵀ·‖x_i − x_j‖; at a step's end, add to dQ."""
    SCORES: gl.constexpr = accumulator_layout(64)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator_layout(dk.shape[1]), k_width=2)
    DTYPE: gl.constexpr = rooms.ds.dtype
    first = block * 64
    zeros = gl.full([64, 64], 0.0, gl.float32, SCORES)
    q = wait_for_block(rooms.q, block, STAGES)
    multiplying = hopper.warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dout = wait_for_block(rooms.dout, block, STAGES)
    differentiating = hopper.warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # [M]
    rows = gl.arange(0, 64, gl.SliceLayout(0, SCORES))
    of_queries = query_terms(scoring, first, rows, first + rows < q_length, False, PARTIAL)
    products = hopper.warpgroup_mma_wait(1, deps=(multiplying,))
    p, ds, back = differentiate_scores(
        products, differentiating, rooms, scoring, of_keys, of_queries, inside_keys, block, STAGES, TERMS, PARTIAL
    )
    dv = hopper.warpgroup_mma(gl.convert_layout(p.to(DTYPE), WEIGHTS), dout, dv, is_async=True)
    if of_keys.bias is not None:
        dbias += gl.sum(ds, 1)
    if back.slope is not None:
        dslope -= gl.sum(back.slope, 1)
    narrow = back.product.to(DTYPE)
    rooms.ds.index(room_of(block, CONSUMER, BLOCKS)).store(narrow)
    # Tensor cores read shared memory asynchronously and see the threads' writes only after a fence.
    hopper.fence_async_shared()
    if ENDS_STEP:
        step = block // BLOCKS
        # The other consumer arrives only once it has read the dSᵀ of the step before: rooms for two steps are enough.
        mbarrier.arrive(rooms.ready, count=1)
        mbarrier.wait(rooms.ready, step & 1)
        dq = multiply_keys(rooms, step, CONSUMER, BLOCKS)
        dk = hopper.warpgroup_mma(gl.convert_layout(narrow, WEIGHTS), q, dk, is_async=True)
        dq, dv = hopper.warpgroup_mma_wait(1, deps=(dq, dv))
        add_query_gradient(dq, rooms, dq_desc, step, CONSUMER, BLOCKS)
        dk = hopper.warpgroup_mma_wait(0, deps=(dk,))
    else:
        dk = hopper.warpgroup_mma(gl.convert_layout(narrow, WEIGHTS), q, dk, is_async=True)
        dk, dv = hopper.warpgroup_mma_wait(0, deps=(dk, dv))
    hand_back(rooms.dout, block, True, STAGES)
    hand_back(rooms.q, block, True, STAGES)
    return dk, dv, dbias, dslope


@gluon.jit
def differentiate_keys(
    rooms,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dbias_tokens,
    dslopes_ptr,
    terms,
    k_bounds,
    heads,
    items_ptr,
    tiles,
    head,
    sequence,
    first,
    q_start,
    q_length,
    k_start,
    keys_left,
    HEAD: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TERMS: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    MASKS_ALL: gl.constexpr,
):
    """Run a consumer, which computes the gradients of the 64 keys from ``first + 64 · CONSUMER`` on."""
    PADDED: gl.constexpr = rooms.k.rows.shape[2]
    KEYS: gl.constexpr = gl.SliceLayout(1, accumulator_layout(64))
    # [N]
    keys = gl.arange(0, 64, KEYS)
    inside_keys = 64 * CONSUMER + keys < keys_left
    scoring = begin_scores(terms, head, sequence, q_start, k_start, False, False, TERMS == 3)
    of_keys = key_terms(scoring, first + 64 * CONSUMER, keys, inside_keys, False, True)
    dq_base_ptr = gradient_base(dq_ptr, q_start, head, heads, HEAD)
    dq_desc = describe_query_gradient(dq_base_ptr, q_length, heads * HEAD, rooms, HEAD)

    dk = gl.full([64, PADDED], 0.0, gl.float32, accumulator_layout(PADDED))
    dv = gl.full([64, PADDED], 0.0, gl.float32, accumulator_layout(PADDED))
    dbias = gl.full([64], 0.0, gl.float32, KEYS)
    dslope = gl.full([64], 0.0, gl.float32, KEYS)
    for half in gl.static_range(2):
        wait_for_block(rooms.k, half, 2)
        wait_for_block(rooms.v, half, 2)
    k, v = rooms.k.rows.index(CONSUMER), rooms.v.rows.index(CONSUMER)
    if IN_REGISTERS:
        OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=accumulator_layout(64), k_width=2)
        k, v = k.load(OPERAND), v.load(OPERAND)
    steps = (q_length + 64 * BLOCKS - 1) // (64 * BLOCKS)
    # Steps of full blocks, with keys that are all inside, need no mask.
    full = 0
    if not MASKS_ALL:  # noqa: SIM102 (decided at compile time)
        if keys_left >= 128:
            full = q_length // (64 * BLOCKS)
    for step in range(full):
        for each in gl.static_range(BLOCKS):
            dk, dv, dbias, dslope = differentiate_block(
                dk, dv, dbias, dslope, k, v, rooms, scoring, of_keys, inside_keys, dq_desc, step * BLOCKS + each,
                q_length, CONSUMER, BLOCKS, STAGES, TERMS, each == BLOCKS - 1, False,
            )  # fmt: skip
    for step in range(full, steps):
        for each in gl.static_range(BLOCKS):
            dk, dv, dbias, dslope = differentiate_block(
                dk, dv, dbias, dslope, k, v, rooms, scoring, of_keys, inside_keys, dq_desc, step * BLOCKS + each,
                q_length, CONSUMER, BLOCKS, STAGES, TERMS, each == BLOCKS - 1, True,
            )  # fmt: skip
    tma.store_wait(0)

    # Looked up again, because the loops need the registers that would hold it meanwhile.
    tile, head, sequence, k_start, k_length, _ = find_work(items_ptr, k_bounds, tiles, heads, 128)
    first = tile * 128
    keys_left = k_length - first
    inside_keys = 64 * CONSUMER + keys < keys_left
    # The values of this consumer have been read, and no other reads them.
    v_rows = rooms.v.rows.index(CONSUMER)
    dv_base_ptr = gradient_base(dv_ptr, k_start + first, head, heads, HEAD)
    store_outputs(v_rows, dv, dv_base_ptr, 64 * CONSUMER, keys_left, heads * HEAD, HEAD)
    scale = terms.scale if TERMS == 3 else terms.scale * LN_2
    dk_base_ptr = gradient_base(dk_ptr, k_start + first, head, heads, HEAD)
    store_outputs(v_rows, dk * scale, dk_base_ptr, 64 * CONSUMER, keys_left, heads * HEAD, HEAD)
    if dbias_tokens.ptr is not None:
        dbias_base_ptr = tokens_base(dbias_tokens, sequence, head, k_start + first, False)
        store_row_values(dbias_base_ptr, 64 * CONSUMER, keys, dbias_tokens.stride_t, inside_keys, dbias, False)
    if dslopes_ptr is not None:
        gl.store(dslopes_ptr + CONSUMER, gl.sum(dslope, 0))
