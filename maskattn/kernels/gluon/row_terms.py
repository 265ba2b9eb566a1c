"""The terms of each query that backward in one pass needs, computed before it: lse, delta and the rest of lse.

They are laid out as the copy engine reads them: by head, in steps of M queries of one sequence, with all terms of a
step next to one another. Queries past the end of a sequence have lse +inf, so that their p is 0, and delta 0.

Dimension key: H heads, D head width; M queries of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.scores import in_units
from maskattn.kernels.language.tiles import (
    LOG2_E,
    load_row_values,
    load_rows,
    row_values_base,
    tokens_base,
)
from maskattn.kernels.launch.arguments import VARYING
from maskattn.kernels.launch.schedule import find_work

__all__ = ["DELTA", "LSE", "REST", "first_row_step", "row_terms_kernel"]

# The terms of a step, in order: lse in the units of the scores, delta, and log2(e) · rest, if there is a rest.
LSE = tl.constexpr(0)
DELTA = tl.constexpr(1)
REST = tl.constexpr(2)


@triton.jit
def first_row_step(q_start, sequence, STEP: tl.constexpr):
    """Return the first step of a sequence's terms; floor(Tq / M) + B steps are enough for all B sequences."""
    return q_start // STEP + sequence


@triton.jit(do_not_specialize=VARYING)
def row_terms_kernel(
    out_tokens,
    dout_tokens,
    lse_values,
    lse_rest_values,
    dlse_values,
    row_terms_ptr,
    row_steps,
    q_bounds,
    heads,
    items_ptr,
    tiles,
    items,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Compute the terms of one step of queries: lse, delta = Σ_d dO_d out_d − dlse, and the rest of lse."""
    tile, head, sequence, q_start, q_length, _ = find_work(items_ptr, q_bounds, tiles, heads, STEP)
    first = tile * STEP
    if first >= q_length:
        return
    # [M]
    rows = tl.arange(0, STEP)
    inside = first + rows < q_length
    lse_base_ptr = row_values_base(lse_values, sequence, head, q_start, False)
    lse = load_row_values(lse_base_ptr, first, rows, 1, inside, float("-inf"), False, True)
    # A row that attends to nothing gets +inf, so that its p is 0.
    empty = lse == float("-inf")
    # [M, D]
    out_base_ptr = tokens_base(out_tokens, sequence, head, q_start, False)
    out = load_rows(out_base_ptr, first, rows, out_tokens.stride_t, inside, HEAD, PADDED, False, True)
    dout_base_ptr = tokens_base(dout_tokens, sequence, head, q_start, False)
    dout = load_rows(dout_base_ptr, first, rows, dout_tokens.stride_t, inside, HEAD, PADDED, False, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_values.ptr is not None:
        dlse_base_ptr = row_values_base(dlse_values, sequence, head, q_start, False)
        delta -= load_row_values(dlse_base_ptr, first, rows, 1, inside, 0.0, False, True)
    step = tl.cast(head, tl.int64) * row_steps + first_row_step(q_start, sequence, STEP) + tile
    terms_ptr = row_terms_ptr + step * (TERMS * STEP) + rows
    tl.store(terms_ptr + LSE * STEP, tl.where(empty, float("inf"), in_units(lse, TERMS == 3)))
    # The gradient of such a row is ignored, even if it is NaN.
    tl.store(terms_ptr + DELTA * STEP, tl.where(empty, 0.0, delta))
    if TERMS == 3:
        rest_base_ptr = row_values_base(lse_rest_values, sequence, head, q_start, False)
        rest = load_row_values(rest_base_ptr, first, rows, 1, inside, 0.0, False, True)
        tl.store(terms_ptr + REST * STEP, rest * LOG2_E)
