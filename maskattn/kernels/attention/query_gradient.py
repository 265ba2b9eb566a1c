"""The gradient of the queries, dq_i = s Σ_j dS_ij k_j; ``backward.py`` defines the symbols.

One program per tile of queries, head and sequence. It also stores delta, and lse in the units of the scores, for the
gradient of the keys, and its terms of the gradient of the slopes, −Σ_ij dS_ij ‖x_i − x_j‖.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.bundles import Keys
from maskattn.kernels.language.chunks import (
    add_weighted_rows,
    describe_chunks,
    dot_rows,
    load_chunks,
    store_chunks,
    sum_of_products,
    zeros_chunks,
)
from maskattn.kernels.language.scores import (
    begin_scores,
    gradient_of_terms,
    in_units,
    kept_factors,
    key_terms,
    query_terms,
    scores,
)
from maskattn.kernels.language.tiles import (
    LOG2_E,
    aligned,
    load_row_values,
    row_values_base,
    sequence_bounds,
    store_row_values,
    tile_rows,
    tokens_base,
)
from maskattn.kernels.launch.arguments import VARYING
from maskattn.kernels.launch.schedule import find_work

__all__ = ["query_gradient_kernel"]


@triton.jit
def add_keys_to_query_gradient(
    dq,
    dslope,
    q,
    dout,
    lse,
    rest_log2,
    delta,
    first_query,
    scoring,
    of_queries,
    keys,
    k_begin,
    k_end,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):
    """Return dq + dS·K and, per query, dslope − Σ dS·‖x_i − x_j‖ over the keys ``k_begin`` to ``k_end``."""
    INDEXED: tl.constexpr = keys.index_ptr is not None
    NATURAL: tl.constexpr = rest_log2 is not None
    for first in tl.range(k_begin, k_end, BLOCK_N, num_stages=TAIL_STAGES if PARTIAL else None):
        inside = first + tl.arange(0, BLOCK_N) < k_end
        rows = tile_rows(keys.index_ptr, keys.start, first, inside, BLOCK_N, INDEXED, PARTIAL)
        # [N, D]
        k = load_chunks(keys.k, first, rows, keys.stride_kt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        if k[0].dtype == tl.float32:
            # Without the barrier the compiler loads q before it waits for k, which takes too many registers; so for v.
            tl.debug_barrier()
        # [M, N]
        qk = dot_rows(q, k, WIDTH)
        of_keys = key_terms(scoring, first, rows, inside, INDEXED, PARTIAL)
        score = scores(qk, scoring, of_queries, of_keys, False)
        excess = score.tile - lse[:, None]
        p = tl.exp2(excess * LOG2_E - rest_log2[:, None]) if NATURAL else tl.exp2(excess)
        if PARTIAL:
            # 2^(0 − lse) may be inf, and inf · 0 is NaN.
            p = tl.where(inside[None, :], p, 0.0)
        # [N, D]; loaded late, so that the operands of both products are not held at the same time.
        v = load_chunks(keys.v, first, rows, keys.stride_vt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        if v[0].dtype == tl.float32:
            tl.debug_barrier()
        dp = dot_rows(dout, v, WIDTH)
        kept = kept_factors(scoring, first_query, first, BLOCK_M, BLOCK_N, False)
        if kept.factors is not None:
            dp *= kept.factors
        back = gradient_of_terms(score, p * (dp - delta[:, None]))
        if back.slope is not None:
            dslope -= tl.sum(back.slope, 1)
        dq = add_weighted_rows(back.product, k, dq, WIDTH)
    return dq, dslope


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    out_tokens,
    lse_values,
    lse_rest_values,
    dout_tokens,
    dlse_values,
    dq_tokens,
    dslopes_ptr,
    delta_values,
    scaled_lse_values,
    terms,
    q_bounds,
    k_bounds,
    scale,
    heads,
    items_ptr,
    tiles,
    items,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):
    """Compute dq, delta, lse in the units of the scores and the terms of dslopes of one tile of queries."""
    NATURAL: tl.constexpr = lse_rest_values.ptr is not None
    INDEX_Q: tl.constexpr = q_bounds.index_ptr is not None
    INDEX_K: tl.constexpr = k_bounds.index_ptr is not None
    tile, head, sequence, q_start, q_length, item = find_work(items_ptr, q_bounds, tiles, heads, BLOCK_M)
    first = tile * BLOCK_M
    if first >= q_length:
        return
    k_start, k_length = sequence_bounds(k_bounds.starts_ptr, k_bounds.ends_ptr, sequence)
    q_tokens, k_tokens, v_tokens = aligned(q_tokens), aligned(k_tokens), aligned(v_tokens)
    out_tokens, dout_tokens, dq_tokens = aligned(out_tokens), aligned(dout_tokens), aligned(dq_tokens)

    # [M]
    inside = first + tl.arange(0, BLOCK_M) < q_length
    rows = tile_rows(q_bounds.index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, True)
    lse_base_ptr = row_values_base(lse_values, sequence, head, q_start, INDEX_Q)
    lse = load_row_values(lse_base_ptr, first, rows, 1, inside, float("-inf"), INDEX_Q, True)
    # A row that attends to nothing gets +inf, so that its p is 0.
    empty = lse == float("-inf")
    lse = tl.where(empty, float("inf"), in_units(lse, NATURAL))
    scaled_lse_base_ptr = row_values_base(scaled_lse_values, sequence, head, q_start, INDEX_Q)
    store_row_values(scaled_lse_base_ptr, first, rows, 1, inside, lse, INDEX_Q)
    rest_log2 = None
    if NATURAL:
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, INDEX_Q)
        rest_log2 = load_row_values(rest_base_ptr, first, rows, 1, inside, 0.0, INDEX_Q, True) * LOG2_E
    # [M, D]
    dout_base_ptr = tokens_base(dout_tokens, sequence, head, q_start, INDEX_Q)
    dout = load_chunks(dout_base_ptr, first, rows, dout_tokens.stride_t, inside, WIDTH, INDEX_Q, True)
    out_base_ptr = tokens_base(out_tokens, sequence, head, q_start, INDEX_Q)
    out = load_chunks(out_base_ptr, first, rows, out_tokens.stride_t, inside, WIDTH, INDEX_Q, True)
    delta = sum_of_products(out, dout, WIDTH)
    if dlse_values.ptr is not None:
        dlse_base_ptr = row_values_base(dlse_values, sequence, head, q_start, INDEX_Q)
        delta -= load_row_values(dlse_base_ptr, first, rows, 1, inside, 0.0, INDEX_Q, True)
    # The gradient of such a row is ignored, even if it is NaN.
    delta = tl.where(empty, 0.0, delta)
    delta_base_ptr = row_values_base(delta_values, sequence, head, q_start, INDEX_Q)
    store_row_values(delta_base_ptr, first, rows, 1, inside, delta, INDEX_Q)

    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, INDEX_Q)
    q = load_chunks(q_base_ptr, first, rows, q_tokens.stride_t, inside, WIDTH, INDEX_Q, True)
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, INDEX_K)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, INDEX_K)
    scoring = begin_scores(terms, head, sequence, q_start, k_start, INDEX_Q, INDEX_K, NATURAL)
    of_queries = query_terms(scoring, first, rows, inside, INDEX_Q, True)
    dslope = 0.0
    if dslopes_ptr is not None:
        dslope = tl.zeros([BLOCK_M], tl.float32)
    k_source, v_source = k_base_ptr, v_base_ptr
    if DESCRIBED:
        k_source = describe_chunks(k_base_ptr, k_length, k_tokens.stride_t, WIDTH, BLOCK_N)
        v_source = describe_chunks(v_base_ptr, k_length, v_tokens.stride_t, WIDTH, BLOCK_N)
    keys = Keys(k_source, v_source, k_bounds.index_ptr, k_start, k_tokens.stride_t, v_tokens.stride_t)
    dq = zeros_chunks(WIDTH, BLOCK_M)
    k_full = k_length // BLOCK_N * BLOCK_N
    dq, dslope = add_keys_to_query_gradient(
        dq, dslope, q, dout, lse, rest_log2, delta, first, scoring, of_queries, keys, 0, k_full, WIDTH, BLOCK_M,
        BLOCK_N, False, DESCRIBED, TAIL_STAGES,
    )  # fmt: skip
    dq, dslope = add_keys_to_query_gradient(
        dq, dslope, q, dout, lse, rest_log2, delta, first, scoring, of_queries, keys, k_full, k_length, WIDTH, BLOCK_M,
        BLOCK_N, True, DESCRIBED, TAIL_STAGES,
    )  # fmt: skip
    dq_base_ptr = tokens_base(dq_tokens, sequence, head, q_start, INDEX_Q)
    store_chunks(dq_base_ptr, first, rows, dq_tokens.stride_t, inside, dq, scale, WIDTH, INDEX_Q)
    if dslopes_ptr is not None:
        tl.store(dslopes_ptr + head * items + item, tl.sum(dslope, 0))
