"""The derivative of every class's score along every token, for scores that depend only on a readout.

With k − k0 and v − v0 as the direction of token t's key and value, o the readout, g_c = ∂f_c/∂o and s the scale:

    S_ct = Σ_h Σ_r p_rht · [ (v − v0)·g_crh + ((v − o_rh)·g_crh) · s (k − k0)·q_rh ]

One program per tile of tokens and tile of classes loops over the heads, so that their sum stays in registers and is
written once: 4·K bytes per token, whereas terms per head would write and read 8·H·K. Tiles of classes are neighbours in
the grid, so that K and V come from memory once and then from the cache, as do the few g. From about 400 classes on
(width 64, half precision) the products take longer than the memory accesses.

Source: the closed form of Brocki, Binda, Chung, arXiv 2312.02364, equation for S.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width, K classes; N tokens and C classes
of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.language.bundles import Tokens
from maskattn.kernels.language.scores import along_product, begin_scores, key_terms, query_terms, scores
from maskattn.kernels.language.softmax import exponential
from maskattn.kernels.language.tiles import aligned, load_rows, sequence_base, sequence_bounds
from maskattn.kernels.launch.arguments import VARYING, known_multiple
from maskattn.kernels.launch.rows import readable
from maskattn.kernels.launch.tail import clear_tail
from maskattn.kernels.readout.call import class_tile, prepare, readout_argument
from maskattn.kernels.readout.tiles import (
    load_lse,
    products,
)
from maskattn.kernels.tables.lookup import choose
from maskattn.options import Options

__all__ = ["relevance_kernel", "token_relevance"]


@triton.jit
def row_pointer(x, sequence, head, row):
    """Return the pointer to a row of a sequence and head."""
    # 64-bit products: K·B·R·H·D can exceed 2^31.
    return (
        x.ptr
        + sequence.to(tl.int64) * x.stride_b
        + head.to(tl.int64) * x.stride_h
        + tl.cast(row, tl.int64) * x.stride_t
    )


@triton.jit
def load_row(x, sequence, head, row, HEAD_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a row of a sequence and head, [1, D]; padded columns are 0."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(row_pointer(x, sequence, head, row) + columns, mask=columns < HEAD_WIDTH, other=0.0)[None, :]


@triton.jit(do_not_specialize=VARYING)
def relevance_kernel(
    q,
    k,
    v,
    terms,
    bounds,
    batch,
    heads,
    queries,
    tokens,
    out,
    lse_ptr,
    grad,
    stride_gc,
    key_origin,
    value_origin,
    relevance_ptr,
    classes,
    class_tiles,
    tiles,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEY_ORIGIN_BY_TOKEN: tl.constexpr,
    VALUE_ORIGIN_BY_TOKEN: tl.constexpr,
):
    """Compute S (K, T) of one tile of tokens and one of classes."""
    program = tl.program_id(0)
    first_class = program % class_tiles * BLOCK_C
    tile, sequence = program // class_tiles % tiles, program // class_tiles // tiles
    start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
    first = tile * BLOCK_N
    if first >= length:
        return
    q, k, v, out, grad = aligned(q), aligned(k), aligned(v), aligned(out), aligned(grad)
    key_origin, value_origin = aligned(key_origin), aligned(value_origin)
    if grad.multiple is not None:
        stride_gc = stride_gc // grad.multiple * grad.multiple
    rows_N, rows_C = tl.arange(0, BLOCK_N), first_class + tl.arange(0, BLOCK_C)
    inside, known = first + rows_N < length, rows_C < classes
    relevance = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for each in tl.range(heads):
        head = tl.cast(each, tl.int32)
        k_base_ptr = sequence_base(k.ptr, sequence, head, start, 0, k.stride_h, k.stride_t, False)
        k_tile = load_rows(k_base_ptr, first, rows_N, k.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        v_base_ptr = sequence_base(v.ptr, sequence, head, start, 0, v.stride_h, v.stride_t, False)
        v_tile = load_rows(v_base_ptr, first, rows_N, v.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        # [N, D], one row per token, or [1, D] for the head.
        if KEY_ORIGIN_BY_TOKEN:
            k0_ptr = sequence_base(
                key_origin.ptr, sequence, head, start, 0, key_origin.stride_h, key_origin.stride_t, False
            )
            k0_tile = load_rows(k0_ptr, first, rows_N, key_origin.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        elif key_origin.ptr is not None:
            k0_tile = load_row(key_origin, sequence, head, 0, HEAD_WIDTH, BLOCK_D)
        if VALUE_ORIGIN_BY_TOKEN:
            v0_ptr = sequence_base(
                value_origin.ptr, sequence, head, start, 0, value_origin.stride_h, value_origin.stride_t, False
            )
            v0_tile = load_rows(v0_ptr, first, rows_N, value_origin.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        elif value_origin.ptr is not None:
            v0_tile = load_row(value_origin, sequence, head, 0, HEAD_WIDTH, BLOCK_D)
        scoring = begin_scores(terms, head, sequence, 0, start, True, False, True)
        of_keys = key_terms(scoring, first, rows_N, inside, False, True)
        for r in tl.range(QUERIES):
            q_row = load_row(q, sequence, head, r, HEAD_WIDTH, BLOCK_D)
            # [N, 1]
            qk = products(k_tile, q_row, 1)
            of_query = query_terms(scoring, r, tl.arange(0, 1), r + tl.arange(0, 1) < QUERIES, False, True)
            score = scores(qk, scoring, of_query, of_keys, True)
            lse = load_lse(lse_ptr, (sequence * queries + r) * heads + head, heads, queries, 1)
            p = exponential(score.tile - lse[None, :])
            if key_origin.ptr is not None:
                qk -= products(k0_tile, q_row, 1)
            change = along_product(score, terms.scale * qk)

            # [C, D]
            g_ptr = row_pointer(grad, sequence, head, r) + first_class.to(tl.int64) * stride_gc
            g = load_rows(g_ptr, 0, tl.arange(0, BLOCK_C), stride_gc, known, HEAD_WIDTH, BLOCK_D, True, True)
            # [N, C]
            along_value = products(v_tile, g, BLOCK_C)
            out_row = load_row(out, sequence, head, r, HEAD_WIDTH, BLOCK_D)
            # [1, C]
            along_out = tl.sum(g.to(tl.float32) * out_row.to(tl.float32), 1)[None, :]
            contribution = along_value * (1 + change) - along_out * change
            if VALUE_ORIGIN_BY_TOKEN:
                contribution -= products(v0_tile, g, BLOCK_C)
            elif value_origin.ptr is not None:
                contribution -= tl.sum(g.to(tl.float32) * v0_tile.to(tl.float32), 1)[None, :]
            relevance += p * contribution

    result_ptr = relevance_ptr + rows_C.to(tl.int64)[None, :] * tokens + (start + first + rows_N)[:, None]
    tl.store(result_ptr, relevance, mask=inside[:, None] & known[None, :])


def token_relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    key_origin: Tensor | None,
    value_origin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: Options,
) -> Tensor:
    """Compute the derivative of K scores of a readout along every token.

    Args:
        q: (B, R, H, D), any strides.
        k, v: (T, H, D), any strides.
        out, lse: (B, R, H, D) and (B, R, H), the readout.
        grad_out: (K, B, R, H, D), the gradient of each score with respect to ``out``.
        key_origin, value_origin: (H, D) or (T, H, D), or None for 0.
        cu_seqlens: (B + 1,) int32, from 0 to T.
        max_seqlen: upper bound of the sequences' lengths.
        options: the options, in the shapes for packed tensors, without dropout; coords_q is (B, R, 2).

    Returns:
        S (K, T) float32.
    """
    classes, (B, R, _, D), T = grad_out.shape[0], q.shape, k.shape[0]
    relevance = torch.empty((classes, T), dtype=torch.float32, device=q.device)
    if classes * B * T == 0:
        return relevance.zero_()
    call = prepare("relevance", q, k, v, cu_seqlens, max_seqlen, options)
    grad = grad_out.to(q.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    of_first, multiple = readout_argument(grad[0]), known_multiple(*grad.stride()[:-1])
    block_c = class_tile(classes, D, q.dtype)
    class_tiles, tiles = triton.cdiv(classes, block_c), triton.cdiv(max_seqlen, call.widths["BLOCK_N"])
    widths = {name: call.widths[name] for name in ("HEAD_WIDTH", "BLOCK_D", "BLOCK_N")}
    launch_options = call.launch_options
    if R == 1 and block_c > 1 and call.widths["BLOCK_D"] <= 64:
        # Products with several classes take their tiles from shared memory, where the next head's can arrive early.
        # Wider heads would spill.
        launch_options = {**launch_options, "num_stages": choose("relevance", q, options).num_stages}
    with torch.cuda.device_of(q):
        relevance_kernel[(class_tiles * tiles * B,)](
            *call.arguments, readout_argument(out), lse.contiguous(), of_first._replace(ptr=grad, multiple=multiple),
            grad.stride(0),
            _origin_argument(key_origin, q.dtype), _origin_argument(value_origin, q.dtype), relevance,
            classes, class_tiles, tiles, **widths, BLOCK_C=block_c, QUERIES=R,
            KEY_ORIGIN_BY_TOKEN=key_origin is not None and key_origin.ndim == 3,
            VALUE_ORIGIN_BY_TOKEN=value_origin is not None and value_origin.ndim == 3, **launch_options,
        )  # fmt: skip
    clear_tail(cu_seqlens, max_seqlen, (relevance.T, 0.0))
    return relevance


def _origin_argument(origin: Tensor | None, dtype: torch.dtype) -> Tokens:
    """Return the argument for an (H, D) or (T, H, D) origin, in the dtype of the keys or values that it belongs to."""
    if origin is None:
        return Tokens(None, 0, 0, 0)
    if origin.ndim == 3:
        origin = readable(origin.to(dtype))
        return Tokens(origin, 0, origin.stride(1), origin.stride(0), known_multiple(*origin.stride()[:2]))
    origin = origin.to(dtype).contiguous()
    return Tokens(origin, 0, origin.stride(0), 0, known_multiple(origin.stride(0)))
