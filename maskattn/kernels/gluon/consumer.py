"""The computation of one warp group: the attention of 64 queries of a tile over all blocks of keys.

While the softmax of a block is computed, the tensor cores compute the products q·k of the next block. Only the last
block can be partial, and only it is masked.

Dimension key: M = 64 queries of a warp group, N keys of a block, D head width padded to a power of two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from maskattn.kernels.gluon.pipeline import hand_back, wait_for_block
from maskattn.kernels.language.scores import begin_scores, key_terms, query_terms, scores
from maskattn.kernels.language.softmax import row_divisor, row_lse, softmax_update
from maskattn.kernels.language.tiles import row_values_base, store_row_values, tokens_base

__all__ = ["GROUP_ROWS", "accumulator_layout", "attend_rows", "store_outputs"]

# Rows of a warp group's smallest matrix product, and its number of warps.
GROUP_ROWS = gl.constexpr(64)
GROUP_WARPS = gl.constexpr(4)


@gluon.constexpr_function
def accumulator_layout(columns):
    """Return the layout in which a warp group's threads hold the result of a product with this many columns."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def row_layout(columns):
    """Return the layout for loading and storing rows [64, columns], 16 bytes per thread."""
    threads = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])


@gluon.jit
def load_queries(q_rows, base_ptr, first, q_length, stride_t, HEAD: gl.constexpr):
    """Write the queries of a warp group to shared memory; rows past the end and padded columns are 0."""
    PADDED: gl.constexpr = q_rows.shape[1]
    LAYOUT: gl.constexpr = row_layout(PADDED)
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, PADDED, gl.SliceLayout(0, LAYOUT))
    pointers = base_ptr + gl.cast(first, gl.int64) * stride_t + (rows * stride_t)[:, None] + columns[None, :]
    inside = (first + rows < q_length)[:, None] & (columns < HEAD)[None, :]
    q_rows.store(gl.load(pointers, mask=inside, other=0.0))
    # Tensor cores read shared memory asynchronously and see the threads' writes only after a fence.
    hopper.fence_async_shared()


@gluon.jit
def store_outputs(q_rows, out, base_ptr, first, q_length, stride_t, HEAD: gl.constexpr):
    """Write the rows inside the sequence, by way of the queries' shared memory, which is free by then."""
    PADDED: gl.constexpr = q_rows.shape[1]
    LAYOUT: gl.constexpr = row_layout(PADDED)
    q_rows.store(out.to(q_rows.dtype))
    rows = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, PADDED, gl.SliceLayout(0, LAYOUT))
    pointers = base_ptr + gl.cast(first, gl.int64) * stride_t + (rows * stride_t)[:, None] + columns[None, :]
    inside = (first + rows < q_length)[:, None] & (columns < HEAD)[None, :]
    gl.store(pointers, q_rows.load(LAYOUT), mask=inside)


@gluon.jit
def begin_products(q_rows, k_ring, block, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Start q·k of a block, [M, N]; the result is valid after a wait."""
    k = wait_for_block(k_ring, block, STAGES)
    zeros = gl.full([64, BLOCK_N], 0.0, gl.float32, accumulator_layout(BLOCK_N))
    return hopper.warpgroup_mma(q_rows, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def weigh(
    products,
    maximum,
    total,
    scoring,
    of_queries,
    first,
    k_length,
    BLOCK_N: gl.constexpr,
    PARTIAL: gl.constexpr,
    NATURAL: gl.constexpr,
):
    """Update the softmax by a block; return weights [M, N], the factor of earlier sums, the new maximum and sum."""
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, accumulator_layout(BLOCK_N)))
    inside = first + keys < k_length
    of_keys = key_terms(scoring, first, keys, inside, False, PARTIAL)
    score = scores(products, scoring, of_queries, of_keys, False, not PARTIAL)
    values = score.tile
    if PARTIAL:
        values = gl.where(inside[None, :], values, float("-inf"))
    # Without a bias, which may be −inf, each row has a score in each block.
    return softmax_update(values, score.factor, maximum, total, 1, NATURAL, NATURAL)


@gluon.jit
def attend_block(
    products,
    out,
    maximum,
    total,
    q_rows,
    k_ring,
    v_ring,
    scoring,
    of_queries,
    block,
    k_length,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    NATURAL: gl.constexpr,
):
    """Attend to a full block before the last, and return the next block's q·k, which are computed meanwhile, first."""
    OUT: gl.constexpr = accumulator_layout(q_rows.shape[1])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    multiplying = begin_products(q_rows, k_ring, block + 1, BLOCK_N, STAGES)
    p, shrunk, maximum, total = weigh(
        products, maximum, total, scoring, of_queries, block * BLOCK_N, k_length, BLOCK_N, False, NATURAL
    )
    out = out * gl.convert_layout(shrunk, gl.SliceLayout(1, OUT))[:, None]
    weights = gl.convert_layout(p.to(q_rows.dtype), WEIGHTS)
    adding = hopper.warpgroup_mma(weights, wait_for_block(v_ring, block, STAGES), out, is_async=True)
    # ptxas overlaps products with other work only if none is in flight when the next iteration begins.
    following, out = hopper.warpgroup_mma_wait(0, deps=(multiplying, adding))
    hand_back(k_ring, block + 1, True, STAGES)
    hand_back(v_ring, block, True, STAGES)
    return following, out, maximum, total


@gluon.jit
def attend_blocks(
    q_rows,
    k_ring,
    v_ring,
    scoring,
    of_queries,
    k_length,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    NATURAL: gl.constexpr,
):
    """Attend to at least one key of a sequence; return the weighted sum [M, D], and each row's maximum and sum."""
    OUT: gl.constexpr = accumulator_layout(q_rows.shape[1])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_N))
    maximum = gl.full([64], float("-inf"), gl.float32, ROWS)
    total = gl.full([64], 0.0, gl.float32, ROWS)
    out = gl.full([64, q_rows.shape[1]], 0.0, gl.float32, OUT)
    last = (k_length + BLOCK_N - 1) // BLOCK_N - 1
    products = hopper.warpgroup_mma_wait(0, deps=(begin_products(q_rows, k_ring, 0, BLOCK_N, STAGES),))
    hand_back(k_ring, 0, True, STAGES)
    # With two blocks per iteration, the products of both have registers of their own and need not be moved.
    for first in range(0, last // UNROLL * UNROLL, UNROLL):
        for step in gl.static_range(UNROLL):
            products, out, maximum, total = attend_block(
                products, out, maximum, total, q_rows, k_ring, v_ring, scoring, of_queries, first + step, k_length,
                BLOCK_N, STAGES, NATURAL,
            )  # fmt: skip
    if UNROLL == 2:  # noqa: SIM102 (decided at compile time)
        if last % 2 == 1:
            products, out, maximum, total = attend_block(
                products, out, maximum, total, q_rows, k_ring, v_ring, scoring, of_queries, last - 1, k_length, BLOCK_N,
                STAGES, NATURAL,
            )  # fmt: skip
    p, shrunk, maximum, total = weigh(
        products, maximum, total, scoring, of_queries, last * BLOCK_N, k_length, BLOCK_N, True, NATURAL
    )
    out = out * gl.convert_layout(shrunk, gl.SliceLayout(1, OUT))[:, None]
    weights = gl.convert_layout(p.to(q_rows.dtype), WEIGHTS)
    out = hopper.warpgroup_mma(weights, wait_for_block(v_ring, last, STAGES), out, is_async=True)
    out = hopper.warpgroup_mma_wait(0, deps=(out,))
    return out, maximum, total


@gluon.jit
def attend_rows(
    q_rows,
    k_ring,
    v_ring,
    q_tokens,
    out_tokens,
    lse_values,
    lse_rest_values,
    terms,
    head,
    sequence,
    first,
    q_start,
    q_length,
    k_start,
    k_length,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
):
    """Run a consumer, which attends with the 64 queries from ``first`` on."""
    NATURAL: gl.constexpr = lse_rest_values.ptr is not None
    PADDED: gl.constexpr = q_rows.shape[1]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_N))
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, accumulator_layout(PADDED))
    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, False)
    load_queries(q_rows, q_base_ptr, first, q_length, q_tokens.stride_t, HEAD)
    rows = gl.arange(0, 64, ROWS)
    inside = first + rows < q_length
    scoring = begin_scores(terms, head, sequence, q_start, k_start, False, False, NATURAL)
    of_queries = query_terms(scoring, first, rows, inside, False, True)

    maximum = gl.full([64], float("-inf"), gl.float32, ROWS)
    total = gl.full([64], 0.0, gl.float32, ROWS)
    out = gl.full([64, PADDED], 0.0, gl.float32, accumulator_layout(PADDED))
    if k_length > 0:
        out, maximum, total = attend_blocks(
            q_rows, k_ring, v_ring, scoring, of_queries, k_length, BLOCK_N, STAGES, UNROLL, NATURAL
        )

    # The output of a row without keys is 0.
    factor = gl.convert_layout(1 / row_divisor(total), OUT_ROWS)
    out_base_ptr = tokens_base(out_tokens, sequence, head, q_start, False)
    store_outputs(q_rows, out * factor[:, None], out_base_ptr, first, q_length, out_tokens.stride_t, HEAD)
    lse, rest = row_lse(maximum, total, NATURAL)
    store_row_values(row_values_base(lse_values, sequence, head, q_start, False), first, rows, 1, inside, lse, False)
    if lse_rest_values.ptr is not None:
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, False)
        store_row_values(rest_base_ptr, first, rows, 1, inside, rest, False)
