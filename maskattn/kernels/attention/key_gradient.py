"""The gradients of the keys: dk_j = s Σ_i dS_ij q_i, dv_j = Σ_i m_ij p_ij dO_i, dbias_j = Σ_i dS_ij.

One program per tile of keys, head and sequence reads delta and lse as the pass over queries stored them. The formulas
are in ``backward.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.bundles import Queries
from maskattn.kernels.language.chunks import (
    add_weighted_rows,
    describe_chunks,
    dot_rows,
    load_chunks,
    store_chunks,
    zeros_chunks,
)
from maskattn.kernels.language.scores import (
    along_product,
    begin_scores,
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

__all__ = ["key_gradient_kernel"]


@triton.jit
def add_queries_to_key_gradient(
    dk,
    dv,
    dbias,
    k,
    v,
    first_key,
    scoring,
    of_keys,
    queries,
    q_begin,
    q_end,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):
    """Return dk + dSᵀ·Q, dv + (m P)ᵀ·dO and dbias + Σ dSᵀ over the queries ``q_begin`` to ``q_end``."""
    INDEXED: tl.constexpr = queries.index_ptr is not None
    for first in tl.range(q_begin, q_end, BLOCK_M, num_stages=TAIL_STAGES if PARTIAL else None):
        inside = first + tl.arange(0, BLOCK_M) < q_end
        rows = tile_rows(queries.index_ptr, queries.start, first, inside, BLOCK_M, INDEXED, PARTIAL)
        # [M, D]
        q = load_chunks(queries.q, first, rows, queries.stride_qt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        # [M]; rows past the end have lse +inf, hence p = 0, so no other mask is needed.
        lse = load_row_values(queries.lse_ptr, first, rows, 1, inside, float("inf"), INDEXED, PARTIAL)
        # [N, M]
        qk = dot_rows(k, q, WIDTH)
        of_queries = query_terms(scoring, first, rows, inside, INDEXED, PARTIAL)
        score = scores(qk, scoring, of_queries, of_keys, True)
        excess = score.tile - lse[None, :]
        if queries.lse_rest_ptr is not None:
            rest = load_row_values(queries.lse_rest_ptr, first, rows, 1, inside, 0.0, INDEXED, PARTIAL)
            p = tl.exp2(excess * LOG2_E - (rest * LOG2_E)[None, :])
        else:
            p = tl.exp2(excess)
        # [M, D]; loaded late, so that the operands of both products are not held at the same time.
        dout = load_chunks(queries.dout, first, rows, queries.stride_gt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        weights = p
        kept = kept_factors(scoring, first, first_key, BLOCK_M, BLOCK_N, True)
        if kept.factors is not None:
            weights = p * kept.factors
        dv = add_weighted_rows(weights, dout, dv, WIDTH)
        delta = load_row_values(queries.delta_ptr, first, rows, 1, inside, 0.0, INDEXED, PARTIAL)
        dp = dot_rows(v, dout, WIDTH)
        if kept.factors is not None:
            dp *= kept.factors
        ds = p * (dp - delta[None, :])
        if of_keys.bias is not None:
            dbias += tl.sum(ds, 1)
        dk = add_weighted_rows(along_product(score, ds), q, dk, WIDTH)
    return dk, dv, dbias


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    scaled_lse_values,
    lse_rest_values,
    dout_tokens,
    delta_values,
    dk_tokens,
    dv_tokens,
    dbias_tokens,
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
    """Compute dk, dv and dbias of one tile of keys."""
    NATURAL: tl.constexpr = lse_rest_values.ptr is not None
    INDEX_Q: tl.constexpr = q_bounds.index_ptr is not None
    INDEX_K: tl.constexpr = k_bounds.index_ptr is not None
    tile, head, sequence, k_start, k_length, _ = find_work(items_ptr, k_bounds, tiles, heads, BLOCK_N)
    first = tile * BLOCK_N
    if first >= k_length:
        return
    q_start, q_length = sequence_bounds(q_bounds.starts_ptr, q_bounds.ends_ptr, sequence)
    q_tokens, k_tokens, v_tokens = aligned(q_tokens), aligned(k_tokens), aligned(v_tokens)
    dout_tokens, dk_tokens, dv_tokens = aligned(dout_tokens), aligned(dk_tokens), aligned(dv_tokens)

    # [N]
    inside = first + tl.arange(0, BLOCK_N) < k_length
    rows = tile_rows(k_bounds.index_ptr, k_start, first, inside, BLOCK_N, INDEX_K, True)
    rest_base_ptr = None
    scoring = begin_scores(terms, head, sequence, q_start, k_start, INDEX_Q, INDEX_K, NATURAL)
    of_keys = key_terms(scoring, first, rows, inside, INDEX_K, True)
    if lse_rest_values.ptr is not None:
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, INDEX_Q)
    # [N, D]
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, INDEX_K)
    k = load_chunks(k_base_ptr, first, rows, k_tokens.stride_t, inside, WIDTH, INDEX_K, True)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, INDEX_K)
    v = load_chunks(v_base_ptr, first, rows, v_tokens.stride_t, inside, WIDTH, INDEX_K, True)

    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, INDEX_Q)
    dout_base_ptr = tokens_base(dout_tokens, sequence, head, q_start, INDEX_Q)
    lse_base_ptr = row_values_base(scaled_lse_values, sequence, head, q_start, INDEX_Q)
    delta_base_ptr = row_values_base(delta_values, sequence, head, q_start, INDEX_Q)
    q_source, dout_source = q_base_ptr, dout_base_ptr
    if DESCRIBED:
        q_source = describe_chunks(q_base_ptr, q_length, q_tokens.stride_t, WIDTH, BLOCK_M)
        dout_source = describe_chunks(dout_base_ptr, q_length, dout_tokens.stride_t, WIDTH, BLOCK_M)
    queries = Queries(
        q_source, dout_source, lse_base_ptr, rest_base_ptr, delta_base_ptr, q_bounds.index_ptr, q_start,
        q_tokens.stride_t, dout_tokens.stride_t,
    )  # fmt: skip
    dk, dv = zeros_chunks(WIDTH, BLOCK_N), zeros_chunks(WIDTH, BLOCK_N)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    q_full = q_length // BLOCK_M * BLOCK_M
    dk, dv, dbias = add_queries_to_key_gradient(
        dk, dv, dbias, k, v, first, scoring, of_keys, queries, 0, q_full, WIDTH, BLOCK_M, BLOCK_N, False, DESCRIBED,
        TAIL_STAGES,
    )  # fmt: skip
    dk, dv, dbias = add_queries_to_key_gradient(
        dk, dv, dbias, k, v, first, scoring, of_keys, queries, q_full, q_length, WIDTH, BLOCK_M, BLOCK_N, True,
        DESCRIBED, TAIL_STAGES,
    )  # fmt: skip
    dk_base_ptr = tokens_base(dk_tokens, sequence, head, k_start, INDEX_K)
    store_chunks(dk_base_ptr, first, rows, dk_tokens.stride_t, inside, dk, scale, WIDTH, INDEX_K)
    dv_base_ptr = tokens_base(dv_tokens, sequence, head, k_start, INDEX_K)
    store_chunks(dv_base_ptr, first, rows, dv_tokens.stride_t, inside, dv, 1.0, WIDTH, INDEX_K)
    if dbias_tokens.ptr is not None:
        dbias_base_ptr = tokens_base(dbias_tokens, sequence, head, k_start, INDEX_K)
        store_row_values(dbias_base_ptr, first, rows, dbias_tokens.stride_t, inside, dbias, INDEX_K)
