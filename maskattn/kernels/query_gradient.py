"""The gradient of the queries: dq_i = s Σ_j dS_ij k_j; formulas and words in ``backward.py``.

One program per tile of queries, head and sequence; it also leaves delta and lse in units of the scores for the gradient
of the keys, and its own part of the gradient of the slopes, −Σ_ij dS_ij ‖x_i − x_j‖.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.arguments import VARYING, Keys
from maskattn.kernels.parts import (
    add_weighted_rows,
    describe_parts,
    dot_rows,
    load_parts,
    store_parts,
    sum_of_products,
    zeros_parts,
)
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
    places,
    slope,
    noise,
    keys,
    k_begin,
    k_end,
    scale,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """dq + dS·K and, for each query, dslope − Σ dS·‖x_i − x_j‖, over the keys ``k_begin`` to ``k_end``."""
    INDEXED: tl.constexpr = keys.index_ptr is not None
    NATURAL: tl.constexpr = keys.bias_ptr is not None
    for first in tl.range(k_begin, k_end, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < k_end
        rows = tile_rows(keys.index_ptr, keys.start, first, inside, BLOCK_N, INDEXED, PARTIAL)
        # [N, D]
        k = load_parts(keys.k, first, rows, keys.stride_kt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        if k[0].dtype == tl.float32:
            # Else the compiler reads q, then waits for k, holding more of q in registers than there are; so for v.
            tl.debug_barrier()
        # [M, N]
        scores = dot_rows(q, k, WIDTH) * scale
        if keys.places_ptr is not None:
            k_places = load_places(
                keys.places_ptr, first, rows, keys.stride_ct, keys.stride_cc, inside, INDEXED, PARTIAL
            )
            distance = distances(places, k_places)
            scores -= distance * slope
        if keys.bias_ptr is not None:
            bias = load_row_values(keys.bias_ptr, first, rows, keys.stride_bt, inside, 0.0, INDEXED, PARTIAL)
            scores += bias[None, :]
        scores -= lse[:, None]
        p = tl.exp2(scores * LOG2_E - rest_log2[:, None]) if NATURAL else tl.exp2(scores)
        if PARTIAL:
            # 2^(0 − lse) may be inf, and inf · 0 is NaN.
            p = tl.where(inside[None, :], p, 0.0)
        # [N, D]; read this late so that the two products do not hold their operands at once.
        v = load_parts(keys.v, first, rows, keys.stride_vt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        if v[0].dtype == tl.float32:
            tl.debug_barrier()
        dp = dot_rows(dout, v, WIDTH)
        if noise is not None:
            dp *= dropout_factors(noise, first_query, first, BLOCK_M, BLOCK_N, False)
        ds = p * (dp - delta[:, None])
        if keys.places_ptr is not None:
            dslope -= tl.sum(ds * distance, 1)
        dq = add_weighted_rows(ds, k, dq, WIDTH)
    return dq, dslope


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    bias_tokens,
    out_tokens,
    lse_values,
    lse_rest_values,
    dout_tokens,
    dlse_values,
    dq_tokens,
    dslopes_ptr,
    delta_values,
    scaled_lse_values,
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
    """dq, delta, lse in units of the scores and a part of dslopes, of one tile of queries."""
    NATURAL: tl.constexpr = bias_tokens.ptr is not None
    INDEX_Q: tl.constexpr = q_span.index_ptr is not None
    INDEX_K: tl.constexpr = k_span.index_ptr is not None
    tile, head, sequence, q_start, q_length, turn = find_work(turns_ptr, q_span, tiles, heads, BLOCK_M)
    first = tile * BLOCK_M
    if first >= q_length:
        return
    k_start, k_length = sequence_span(k_span.starts_ptr, k_span.ends_ptr, sequence)

    # [M]
    inside = first + tl.arange(0, BLOCK_M) < q_length
    rows = tile_rows(q_span.index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, True)
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
    dout = load_parts(dout_base_ptr, first, rows, dout_tokens.stride_t, inside, WIDTH, INDEX_Q, True)
    out_base_ptr = tokens_base(out_tokens, sequence, head, q_start, INDEX_Q)
    out = load_parts(out_base_ptr, first, rows, out_tokens.stride_t, inside, WIDTH, INDEX_Q, True)
    delta = sum_of_products(out, dout, WIDTH)
    if dlse_values.ptr is not None:
        dlse_base_ptr = row_values_base(dlse_values, sequence, head, q_start, INDEX_Q)
        delta -= load_row_values(dlse_base_ptr, first, rows, 1, inside, 0.0, INDEX_Q, True)
    # What comes back to such a row has nowhere to go, were it NaN.
    delta = tl.where(empty, 0.0, delta)
    delta_base_ptr = row_values_base(delta_values, sequence, head, q_start, INDEX_Q)
    store_row_values(delta_base_ptr, first, rows, 1, inside, delta, INDEX_Q)

    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, INDEX_Q)
    q = load_parts(q_base_ptr, first, rows, q_tokens.stride_t, inside, WIDTH, INDEX_Q, True)
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, INDEX_K)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, INDEX_K)
    bias_base_ptr = None
    if bias_tokens.ptr is not None:
        bias_base_ptr = tokens_base(bias_tokens, sequence, head, k_start, INDEX_K)
    places, k_places_ptr, slope, noise = None, None, 0.0, None
    dslope = 0.0
    if slopes_ptr is not None:
        slope = in_units(tl.load(slopes_ptr + head).to(tl.float32), NATURAL)
        q_places_ptr = places_base(q_places, sequence, q_start, INDEX_Q)
        k_places_ptr = places_base(k_places, sequence, k_start, INDEX_K)
        places = load_places(q_places_ptr, first, rows, q_places.stride_t, q_places.stride_c, inside, INDEX_Q, True)
        dslope = tl.zeros([BLOCK_M], tl.float32)
    if dropout.seed_ptr is not None:
        noise = load_noise(dropout, head, sequence)
    k_source, v_source = k_base_ptr, v_base_ptr
    if DESCRIBED:
        k_source = describe_parts(k_base_ptr, k_length, k_tokens.stride_t, WIDTH, BLOCK_N)
        v_source = describe_parts(v_base_ptr, k_length, v_tokens.stride_t, WIDTH, BLOCK_N)
    keys = Keys(
        k_source, v_source, bias_base_ptr, k_places_ptr, k_span.index_ptr, k_start, k_tokens.stride_t,
        v_tokens.stride_t, bias_tokens.stride_t, k_places.stride_t, k_places.stride_c,
    )  # fmt: skip
    dq = zeros_parts(WIDTH, BLOCK_M)
    k_full = k_length // BLOCK_N * BLOCK_N
    dq, dslope = add_keys_to_query_gradient(
        dq, dslope, q, dout, lse, rest_log2, delta, first, places, slope, noise, keys, 0, k_full, scale_in_units,
        WIDTH, BLOCK_M, BLOCK_N, False, DESCRIBED,
    )  # fmt: skip
    dq, dslope = add_keys_to_query_gradient(
        dq, dslope, q, dout, lse, rest_log2, delta, first, places, slope, noise, keys, k_full, k_length,
        scale_in_units, WIDTH, BLOCK_M, BLOCK_N, True, DESCRIBED,
    )  # fmt: skip
    dq_base_ptr = tokens_base(dq_tokens, sequence, head, q_start, INDEX_Q)
    store_parts(dq_base_ptr, first, rows, dq_tokens.stride_t, inside, dq, scale, WIDTH, INDEX_Q)
    if slopes_ptr is not None:
        tl.store(dslopes_ptr + head * turns + turn, tl.sum(dslope, 0))
