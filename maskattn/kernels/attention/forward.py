"""Forward attention: out_i = Σ_j m_ij p_ij v_j with p_ij = exp(score_ij − lse_i) and lse_i = log Σ_j exp(score_ij).

One program per tile of queries, head and sequence loops over tiles of keys (FlashAttention-2, arXiv 2307.08691,
algorithm 1). ``maskattn.attention.reference`` is the specification.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.language.bundles import Keys
from maskattn.kernels.language.chunks import (
    add_weighted_rows,
    describe_chunks,
    dot_rows,
    load_chunks,
    scale_chunks,
    store_chunks,
    zeros_chunks,
)
from maskattn.kernels.language.scores import (
    begin_scores,
    kept_factors,
    key_terms,
    query_terms,
    scores,
)
from maskattn.kernels.language.softmax import row_divisor, row_lse, softmax_update
from maskattn.kernels.language.tiles import (
    aligned,
    row_values_base,
    sequence_bounds,
    store_row_values,
    tile_rows,
    tokens_base,
)
from maskattn.kernels.launch.arguments import (
    VARYING,
    bounds_argument,
    constant_arguments,
    empty_rest,
    keeps_rest,
    rest_argument,
    row_values_argument,
    tensors_of,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.descriptors import describable
from maskattn.kernels.launch.prepared import Launch, launch_prepared
from maskattn.kernels.launch.recording import allocate
from maskattn.kernels.launch.replay import replayed
from maskattn.kernels.launch.rows import Rows, packed_rows_of, readable
from maskattn.kernels.launch.schedule import find_work, plan_work
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.tables.lookup import choose
from maskattn.operands import Sequences
from maskattn.options import Options

__all__ = ["attend", "forward_kernel", "packed_forward"]


@triton.jit
def attend_keys(
    out,
    maximum,
    total,
    q,
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
    NATURAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):
    """Attend to the keys ``k_begin`` to ``k_end`` of a sequence; ``PARTIAL`` if they do not fill their tiles."""
    INDEXED: tl.constexpr = keys.index_ptr is not None
    for first in tl.range(k_begin, k_end, BLOCK_N, num_stages=TAIL_STAGES if PARTIAL else None):
        inside = first + tl.arange(0, BLOCK_N) < k_end
        rows = tile_rows(keys.index_ptr, keys.start, first, inside, BLOCK_N, INDEXED, PARTIAL)
        # [N, D]
        k = load_chunks(keys.k, first, rows, keys.stride_kt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        of_keys = key_terms(scoring, first, rows, inside, INDEXED, PARTIAL)
        # [M, N]
        score = scores(dot_rows(q, k, WIDTH), scoring, of_queries, of_keys, False, not PARTIAL)
        values = score.tile
        if PARTIAL:
            values = tl.where(inside[None, :], values, float("-inf"))
        # Without a bias, which may be −inf, each row has a score in each tile.
        p, shrunk, maximum, total = softmax_update(values, score.factor, maximum, total, 1, NATURAL, NATURAL)
        kept = kept_factors(scoring, first_query, first, BLOCK_M, BLOCK_N, False)
        if kept.factors is not None:
            p *= kept.factors
        # [N, D]
        v = load_chunks(keys.v, first, rows, keys.stride_vt, inside, WIDTH, INDEXED, PARTIAL, DESCRIBED)
        out = add_weighted_rows(p, v, scale_chunks(out, shrunk[:, None], WIDTH), WIDTH)
    return out, maximum, total


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
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
    WIDTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):
    """Compute the attention of one tile of queries over all keys of its sequence."""
    NATURAL: tl.constexpr = lse_rest_values.ptr is not None
    INDEX_Q: tl.constexpr = q_bounds.index_ptr is not None
    INDEX_K: tl.constexpr = k_bounds.index_ptr is not None
    tile, head, sequence, q_start, q_length, _ = find_work(items_ptr, q_bounds, tiles, heads, BLOCK_M)
    first = tile * BLOCK_M
    if first >= q_length:
        return
    k_start, k_length = sequence_bounds(k_bounds.starts_ptr, k_bounds.ends_ptr, sequence)
    q_tokens, k_tokens, v_tokens, out_tokens = (
        aligned(q_tokens), aligned(k_tokens), aligned(v_tokens), aligned(out_tokens)
    )  # fmt: skip
    k_base_ptr = tokens_base(k_tokens, sequence, head, k_start, INDEX_K)
    v_base_ptr = tokens_base(v_tokens, sequence, head, k_start, INDEX_K)

    # [M]
    inside = first + tl.arange(0, BLOCK_M) < q_length
    rows = tile_rows(q_bounds.index_ptr, q_start, first, inside, BLOCK_M, INDEX_Q, True)
    scoring = begin_scores(terms, head, sequence, q_start, k_start, INDEX_Q, INDEX_K, NATURAL)
    of_queries = query_terms(scoring, first, rows, inside, INDEX_Q, True)
    # [M, D]
    q_base_ptr = tokens_base(q_tokens, sequence, head, q_start, INDEX_Q)
    q = load_chunks(q_base_ptr, first, rows, q_tokens.stride_t, inside, WIDTH, INDEX_Q, True)

    k_source, v_source = k_base_ptr, v_base_ptr
    if DESCRIBED:
        k_source = describe_chunks(k_base_ptr, k_length, k_tokens.stride_t, WIDTH, BLOCK_N)
        v_source = describe_chunks(v_base_ptr, k_length, v_tokens.stride_t, WIDTH, BLOCK_N)
    keys = Keys(k_source, v_source, k_bounds.index_ptr, k_start, k_tokens.stride_t, v_tokens.stride_t)
    out = zeros_chunks(WIDTH, BLOCK_M)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_full = k_length // BLOCK_N * BLOCK_N
    out, maximum, total = attend_keys(
        out, maximum, total, q, first, scoring, of_queries, keys, 0, k_full, WIDTH, BLOCK_M, BLOCK_N, False, NATURAL,
        DESCRIBED, TAIL_STAGES,
    )  # fmt: skip
    out, maximum, total = attend_keys(
        out, maximum, total, q, first, scoring, of_queries, keys, k_full, k_length, WIDTH, BLOCK_M, BLOCK_N, True,
        NATURAL, DESCRIBED, TAIL_STAGES,
    )  # fmt: skip

    # The output of a row without keys is 0.
    divisor = row_divisor(total)
    out_base_ptr = tokens_base(out_tokens, sequence, head, q_start, INDEX_Q)
    store_chunks(out_base_ptr, first, rows, out_tokens.stride_t, inside, out, (1 / divisor)[:, None], WIDTH, INDEX_Q)
    lse_base_ptr = row_values_base(lse_values, sequence, head, q_start, INDEX_Q)
    lse, rest = row_lse(maximum, total, NATURAL)
    store_row_values(lse_base_ptr, first, rows, 1, inside, lse, INDEX_Q)
    if lse_rest_values.ptr is not None:
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, INDEX_Q)
        store_row_values(rest_base_ptr, first, rows, 1, inside, rest, INDEX_Q)


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention of packed sequences.

    Args:
        q: (Tq, H, D), any strides.
        k, v: (Tk, H, D), any strides.
        sequences: the boundaries of the sequences.
        options: the options, in the shapes for packed tensors.

    Returns:
        out (Tq, H, D) in q's dtype, lse (H, Tq) float32 and its rest.
    """
    out, lse, rest = replayed(_packed_forward, (q, k, v), sequences, options)
    return out, lse, rest


def _packed_forward(
    qkv: tuple[Tensor, Tensor, Tensor], sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv
    out = allocate(q.shape, q.dtype, q.device)
    lse = allocate((q.shape[1], q.shape[0]), torch.float32, q.device)
    rest = empty_rest(lse, options)
    attend(q, k, v, options, out, lse, rest, *packed_rows_of(sequences, q, k))
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
    """Fill ``out``, ``lse`` and its rest for the given rows of packed or dense tensors."""
    scale = options.scale
    if scale < 0:
        # The kernel takes the maximum before scaling, which needs a scale of at least 0.
        q, scale = -q, -scale
    q, k, v = readable(q), readable(k), readable(v)
    head_width, heads = q.shape[-1], q.shape[1]
    config = choose("forward", q, options, k_rows.longest)
    work = plan_work(q_rows, k_rows, config.block_m)

    def make() -> Launch:
        described = config.descriptors and describable(k, k_rows) and describable(v, k_rows)
        arguments = (
            tokens_argument(q), tokens_argument(k), tokens_argument(v), tokens_argument(out), row_values_argument(lse),
            rest_argument(lse_rest), terms_argument(options, q.ndim == 3, keeps_rest(options), scale),
            bounds_argument(q_rows), bounds_argument(k_rows), heads, *work,
        )  # fmt: skip
        constants = constant_arguments(head_width, config, described)
        return Launch(forward_kernel, work.items * heads, described, arguments, constants)

    known = forward_kernel, config, head_width, heads, scale, options.dropout_p, work.tiles, work.items
    tensors = q, k, v, out, lse, lse_rest, *tensors_of(options), *q_rows.tensors, *k_rows.tensors, work.items_ptr
    launch_prepared(known, tensors, make, q)
