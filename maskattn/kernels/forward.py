"""Forward attention: out_i = Σ_j m_ij p_ij v_j, p_ij = exp(score_ij − lse_i), lse_i the log of the row's sum.

One program per tile of queries, head and sequence; the keys pass by in tiles (FlashAttention-2, arXiv 2307.08691,
algorithm 1). ``maskattn.attention.reference`` is the specification.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.arguments import (
    VARYING,
    Keys,
    bias_argument,
    constant_arguments,
    dropout_argument,
    places_argument,
    rest_argument,
    row_values_argument,
    scale_argument,
    slopes_argument,
    span_argument,
    tokens_argument,
)
from maskattn.kernels.configs import choose
from maskattn.kernels.descriptors import describable, launch
from maskattn.kernels.parts import (
    add_weighted_rows,
    describe_parts,
    dot_rows,
    load_parts,
    scale_parts,
    store_parts,
    zeros_parts,
)
from maskattn.kernels.rows import Rows, packed_sides, readable
from maskattn.kernels.schedule import find_work, plan_work
from maskattn.kernels.scores import (
    distances,
    dropout_factors,
    in_units,
    load_noise,
    load_places,
    softmax_update,
)
from maskattn.kernels.tail import clear_tail
from maskattn.kernels.tiles import (
    LN_2,
    load_row_values,
    places_base,
    row_values_base,
    sequence_span,
    store_row_values,
    tile_rows,
    tokens_base,
)
from maskattn.options import Options, Sequences, empty_rest

__all__ = ["attend", "forward_kernel", "packed_forward"]


@triton.jit
def attend_keys(
    out,
    maximum,
    total,
    q,
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
    """Attend to the keys ``k_begin`` to ``k_end`` of a sequence; ``PARTIAL`` when they do not fill their tiles."""
    INDEXED: tl.constexpr = keys.index_ptr is not None
    for first in tl.range(k_begin, k_end, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < k_end
        rows = tile_rows(keys.index_ptr, keys.start, first, inside, BLOCK_N, INDEXED, PARTIAL)
        # [N, D]
        k = load_parts(keys.k, first, rows, keys.stride_kt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        bias, penalty = 0.0, 0.0
        if keys.bias_ptr is not None:
            bias = load_row_values(keys.bias_ptr, first, rows, keys.stride_bt, inside, 0.0, INDEXED, PARTIAL)
        # [M, N]
        qk = dot_rows(q, k, WIDTH)
        if keys.places_ptr is not None:
            k_places = load_places(
                keys.places_ptr, first, rows, keys.stride_ct, keys.stride_cc, inside, INDEXED, PARTIAL
            )
            penalty = distances(places, k_places) * slope
        p, factor, maximum, total = softmax_update(
            qk, maximum, total, scale, bias, inside, keys.bias_ptr is not None, PARTIAL, penalty,
            keys.places_ptr is not None,
        )  # fmt: skip
        if noise is not None:
            p *= dropout_factors(noise, first_query, first, BLOCK_M, BLOCK_N, False)
        # [N, D]
        v = load_parts(keys.v, first, rows, keys.stride_vt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        out = add_weighted_rows(p, v, scale_parts(out, factor[:, None], WIDTH), WIDTH)
    return out, maximum, total


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_tokens,
    k_tokens,
    v_tokens,
    bias_tokens,
    out_tokens,
    lse_values,
    lse_rest_values,
    slopes_ptr,
    q_places,
    k_places,
    dropout,
    q_span,
    k_span,
    scale,
    heads,
    turns_ptr,
    tiles,
    turns,
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Attention of one tile of queries over all keys of its sequence; ``scale`` is in units of the scores."""
    NATURAL: tl.constexpr = bias_tokens.ptr is not None
    INDEX_Q: tl.constexpr = q_span.index_ptr is not None
    INDEX_K: tl.constexpr = k_span.index_ptr is not None
    tile, head, sequence, q_start, q_length, _ = find_work(turns_ptr, q_span, tiles, heads, BLOCK_M)
    first = tile * BLOCK_M
    if first >= q_length:
        return
    k_start, k_length = sequence_span(k_span.starts_ptr, k_span.ends_ptr, sequence)
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, INDEX_K)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, INDEX_K)
    bias_base_ptr = None
    if bias_tokens.ptr is not None:
        bias_base_ptr = tokens_base(bias_tokens, sequence, head, k_start, INDEX_K)

    # [M]
    inside = first + tl.arange(0, BLOCK_M) < q_length
    rows = tile_rows(q_span.index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, True)
    places, k_places_ptr, slope, noise = None, None, 0.0, None
    if slopes_ptr is not None:
        slope = in_units(tl.load(slopes_ptr + head).to(tl.float32), NATURAL)
        q_places_ptr = places_base(q_places, sequence, q_start, INDEX_Q)
        k_places_ptr = places_base(k_places, sequence, k_start, INDEX_K)
        places = load_places(q_places_ptr, first, rows, q_places.stride_t, q_places.stride_c, inside, INDEX_Q, True)
    if dropout.seed_ptr is not None:
        noise = load_noise(dropout, head, sequence)
    # [M, D]
    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, INDEX_Q)
    q = load_parts(q_base_ptr, first, rows, q_tokens.stride_t, inside, WIDTH, INDEX_Q, True)

    k_source, v_source = k_base_ptr, v_base_ptr
    if DESCRIBED:
        k_source = describe_parts(k_base_ptr, k_length, k_tokens.stride_t, WIDTH, BLOCK_N)
        v_source = describe_parts(v_base_ptr, k_length, v_tokens.stride_t, WIDTH, BLOCK_N)
    keys = Keys(
        k_source, v_source, bias_base_ptr, k_places_ptr, k_span.index_ptr, k_start, k_tokens.stride_t,
        v_tokens.stride_t, bias_tokens.stride_t, k_places.stride_t, k_places.stride_c,
    )  # fmt: skip
    out = zeros_parts(WIDTH, BLOCK_M)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_full = k_length // BLOCK_N * BLOCK_N
    out, maximum, total = attend_keys(
        out, maximum, total, q, first, places, slope, noise, keys, 0, k_full, scale, WIDTH, BLOCK_M,
        BLOCK_N, False, DESCRIBED,
    )  # fmt: skip
    out, maximum, total = attend_keys(
        out, maximum, total, q, first, places, slope, noise, keys, k_full, k_length, scale, WIDTH, BLOCK_M,
        BLOCK_N, True, DESCRIBED,
    )  # fmt: skip

    # A row without keys has total 0 and maximum −inf: its output is 0 and its lse −inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    out_base_ptr = tokens_base(out_tokens, sequence, head, q_start, INDEX_Q)
    store_parts(out_base_ptr, first, rows, out_tokens.stride_t, inside, out, (1 / divisor)[:, None], WIDTH, INDEX_Q)
    lse_base_ptr = row_values_base(lse_values, sequence, head, q_start, INDEX_Q)
    largest = maximum if NATURAL else maximum * LN_2
    store_row_values(lse_base_ptr, first, rows, 1, inside, largest + tl.log(divisor), INDEX_Q)
    if lse_rest_values.ptr is not None:
        # What rounding takes from lse, without which it would not tell how many keys share a large score.
        largest = tl.where(total == 0.0, 0.0, largest)
        rest = largest - (largest + tl.log(divisor)) + tl.log(divisor)
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, INDEX_Q)
        store_row_values(rest_base_ptr, first, rows, 1, inside, rest, INDEX_Q)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of packed sequences.

    Args:
        q: (Tq, H, D), any strides.
        k, v: (Tk, H, D).
        sequences: where they lie.
        options: of packed tensors.

    Returns:
        out (Tq, H, D) in q's dtype, lse (H, Tq) float32 and its rest.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    rest = empty_rest(lse, "triton", options)
    attend(q, k, v, options, out, lse, rest, *packed_sides(sequences, q, k))
    clear_tail(
        sequences.cu_seqlens_q,
        sequences.max_seqlen_q,
        (out, 0.0),
        (lse.T, float("-inf")),
        *((x.T, 0.0) for x in (rest,) if x.ndim == 2),
    )
    return out, lse, rest


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    q_rows: Rows,
    k_rows: Rows,
) -> None:
    """Fill ``out``, ``lse`` and its rest where there are rows; shapes as of packed or of dense tensors."""
    scale = options.scale
    if scale < 0:
        # The kernel takes the maximum before it scales.
        q, scale = -q, -scale
    q, k, v = readable(q), readable(k), readable(v)
    head_width, heads = q.shape[-1], q.shape[1]
    config = choose("forward", q, options)
    work = plan_work(q_rows, k_rows, config.block_m)
    described = config.descriptors and describable(k, k_rows) and describable(v, k_rows)
    launch(
        forward_kernel, work.turns * heads, described, q,
        tokens_argument(q), tokens_argument(k), tokens_argument(v),
        bias_argument(options.key_bias, packed=q.ndim == 3), tokens_argument(out), row_values_argument(lse),
        rest_argument(lse_rest),
        slopes_argument(options), places_argument(options.coords_q), places_argument(options.coords_k),
        dropout_argument(options), span_argument(q_rows), span_argument(k_rows), scale_argument(scale, options), heads,
        *work, **constant_arguments(head_width, config, described),
    )  # fmt: skip
