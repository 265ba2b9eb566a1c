"""The gradients of the keys: dk_j = s Σ_i dS_ij q_i, dv_j = Σ_i m_ij p_ij dO_i, dbias_j = Σ_i dS_ij.

One program per tile of keys, head and sequence, after the gradient of the queries has left delta and lse; formulas in
``backward.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.arguments import VARYING, Queries
from maskattn.kernels.parts import add_weighted_rows, describe_parts, dot_rows, load_parts, store_parts, zeros_parts
from maskattn.kernels.schedule import find_work
from maskattn.kernels.scores import distances, dropout_factors, in_units, load_noise, load_places
from maskattn.kernels.tiles import (
    LOG2_E,
    load_row_values,
    places_base,
    row_values_base,
    sequence_span,
    store_row_values,
    tile_rows,
    tokens_base,
)

__all__ = ["key_gradient_kernel"]


@triton.jit
def add_queries_to_key_gradient(
    dk,
    dv,
    dbias,
    k,
    v,
    bias,
    first_key,
    places,
    slope,
    noise,
    queries,
    q_begin,
    q_end,
    scale,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """dk + dSᵀ·Q, dv + (m P)ᵀ·dO, dbias + Σ dSᵀ over the queries ``q_begin`` to ``q_end``."""
    INDEXED: tl.constexpr = queries.index_ptr is not None
    for first in tl.range(q_begin, q_end, BLOCK_M):
        inside = first + tl.arange(0, BLOCK_M) < q_end
        rows = tile_rows(queries.index_ptr, queries.start, first, inside, BLOCK_M, INDEXED, PARTIAL)
        # [M, D]
        q = load_parts(queries.q, first, rows, queries.stride_qt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        # [M]; rows past the end have lse +inf, hence p = 0, and need no other mask.
        lse = load_row_values(queries.lse_ptr, first, rows, 1, inside, float("inf"), INDEXED, PARTIAL)
        # [N, M]
        scores = dot_rows(k, q, WIDTH) * scale
        if queries.places_ptr is not None:
            q_places = load_places(
                queries.places_ptr, first, rows, queries.stride_ct, queries.stride_cc, inside, INDEXED, PARTIAL
            )
            scores -= distances(places, q_places) * slope
        if bias is not None:
            scores += bias[:, None]
            rest = load_row_values(queries.lse_rest_ptr, first, rows, 1, inside, 0.0, INDEXED, PARTIAL)
            p = tl.exp2((scores - lse[None, :]) * LOG2_E - (rest * LOG2_E)[None, :])
        else:
            p = tl.exp2(scores - lse[None, :])
        # [M, D]; read this late so that the products do not hold their operands at once.
        dout = load_parts(queries.dout, first, rows, queries.stride_gt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        weights = p
        if noise is not None:
            factors = dropout_factors(noise, first, first_key, BLOCK_M, BLOCK_N, True)
            weights = p * factors
        dv = add_weighted_rows(weights, dout, dv, WIDTH)
        delta = load_row_values(queries.delta_ptr, first, rows, 1, inside, 0.0, INDEXED, PARTIAL)
        dp = dot_rows(v, dout, WIDTH)
        if noise is not None:
            dp *= factors
        ds = p * (dp - delta[None, :])
        if bias is not None:
            dbias += tl.sum(ds, 1)
        dk = add_weighted_rows(ds, q, dk, WIDTH)
    return dk, dv, dbias


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    bias_tokens,
    scaled_lse_values,
    lse_rest_values,
    dout_tokens,
    delta_values,
    dk_tokens,
    dv_tokens,
    dbias_tokens,
    slopes_ptr,
    q_places,
    k_places,
    dropout,
    q_span,
    k_span,
    scale,
    scale_in_units,
    heads,
    turns_ptr,
    tiles,
    turns,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """dk, dv and dbias of one tile of keys."""
    NATURAL: tl.constexpr = bias_tokens.ptr is not None
    INDEX_Q: tl.constexpr = q_span.index_ptr is not None
    INDEX_K: tl.constexpr = k_span.index_ptr is not None
    tile, head, sequence, k_start, k_length, _ = find_work(turns_ptr, k_span, tiles, heads, BLOCK_N)
    first = tile * BLOCK_N
    if first >= k_length:
        return
    q_start, q_length = sequence_span(q_span.starts_ptr, q_span.ends_ptr, sequence)

    # [N]
    inside = first + tl.arange(0, BLOCK_N) < k_length
    rows = tile_rows(k_span.index_ptr, k_start, first, inside, BLOCK_N, INDEX_K, True)
    bias, rest_base_ptr = None, None
    if bias_tokens.ptr is not None:
        bias_base_ptr = tokens_base(bias_tokens, sequence, head, k_start, INDEX_K)
        bias = load_row_values(bias_base_ptr, first, rows, bias_tokens.stride_t, inside, 0.0, INDEX_K, True)
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, INDEX_Q)
    places, q_places_ptr, slope, noise = None, None, 0.0, None
    if slopes_ptr is not None:
        slope = in_units(tl.load(slopes_ptr + head).to(tl.float32), NATURAL)
        q_places_ptr = places_base(q_places, sequence, q_start, INDEX_Q)
        k_places_ptr = places_base(k_places, sequence, k_start, INDEX_K)
        places = load_places(k_places_ptr, first, rows, k_places.stride_t, k_places.stride_c, inside, INDEX_K, True)
    if dropout.seed_ptr is not None:
        noise = load_noise(dropout, head, sequence)
    # [N, D]
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, INDEX_K)
    k = load_parts(k_base_ptr, first, rows, k_tokens.stride_t, inside, WIDTH, INDEX_K, True)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, INDEX_K)
    v = load_parts(v_base_ptr, first, rows, v_tokens.stride_t, inside, WIDTH, INDEX_K, True)

    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, INDEX_Q)
    dout_base_ptr = tokens_base(dout_tokens, sequence, head, q_start, INDEX_Q)
    lse_base_ptr = row_values_base(scaled_lse_values, sequence, head, q_start, INDEX_Q)
    delta_base_ptr = row_values_base(delta_values, sequence, head, q_start, INDEX_Q)
    q_source, dout_source = q_base_ptr, dout_base_ptr
    if DESCRIBED:
        q_source = describe_parts(q_base_ptr, q_length, q_tokens.stride_t, WIDTH, BLOCK_M)
        dout_source = describe_parts(dout_base_ptr, q_length, dout_tokens.stride_t, WIDTH, BLOCK_M)
    queries = Queries(
        q_source, dout_source, lse_base_ptr, rest_base_ptr, delta_base_ptr, q_places_ptr, q_span.index_ptr, q_start,
        q_tokens.stride_t, dout_tokens.stride_t, q_places.stride_t, q_places.stride_c,
    )  # fmt: skip
    dk, dv = zeros_parts(WIDTH, BLOCK_N), zeros_parts(WIDTH, BLOCK_N)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    q_full = q_length // BLOCK_M * BLOCK_M
    dk, dv, dbias = add_queries_to_key_gradient(
        dk, dv, dbias, k, v, bias, first, places, slope, noise, queries, 0, q_full, scale_in_units, WIDTH,
        BLOCK_M, BLOCK_N, False, DESCRIBED,
    )  # fmt: skip
    dk, dv, dbias = add_queries_to_key_gradient(
        dk, dv, dbias, k, v, bias, first, places, slope, noise, queries, q_full, q_length, scale_in_units,
        WIDTH, BLOCK_M, BLOCK_N, True, DESCRIBED,
    )  # fmt: skip
    dk_base_ptr = tokens_base(dk_tokens, sequence, head, k_start, INDEX_K)
    store_parts(dk_base_ptr, first, rows, dk_tokens.stride_t, inside, dk, scale, WIDTH, INDEX_K)
    dv_base_ptr = tokens_base(dv_tokens, sequence, head, k_start, INDEX_K)
    store_parts(dv_base_ptr, first, rows, dv_tokens.stride_t, inside, dv, 1.0, WIDTH, INDEX_K)
    if bias_tokens.ptr is not None:
        dbias_base_ptr = tokens_base(dbias_tokens, sequence, head, k_start, INDEX_K)
        store_row_values(dbias_base_ptr, first, rows, dbias_tokens.stride_t, inside, dbias, INDEX_K)
