"""The online softmax, in which each row sums its weights relative to its largest score so far.

For a query row with running maximum m, sum l and accumulator a, a tile of scores s gives the updates

    m' = max(m, max s)      p = exp(s − m')      l' = l·exp(m − m') + Σ p      a' = a·exp(m − m') + p·V

and after the last tile out = a / l and lse = m + log l. Scores are natural or in units of log2; see ``scores.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.tiles import LN_2, LOG2_E

__all__ = ["exponential", "finite_or_zero", "power", "row_divisor", "row_lse", "softmax_update"]


@triton.jit
def exponential(difference):
    """Return e to the power of a difference of natural scores; tl.exp would spend instructions on denormal numbers."""
    return tl.exp2(difference * LOG2_E)


@triton.jit
def power(difference, NATURAL: tl.constexpr):
    """Return e to the power of a difference of scores in either unit."""
    return exponential(difference) if NATURAL else tl.exp2(difference)


@triton.jit
def finite_or_zero(maximum):
    """Replace a maximum of −inf, of a row without scores so far, by 0, since −inf − (−inf) would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def softmax_update(
    scores, factor, maximum, total, AXIS: tl.constexpr, MAY_BE_EMPTY: tl.constexpr, NATURAL: tl.constexpr
):
    """Update by a tile of scores; return weights p of its shape, the factor of earlier sums, the new maximum and sum.

    Args:
        scores: a tile, with keys along ``AXIS``.
        factor: positive factor still to be applied to the scores; None for 1. It commutes with the maximum, and in p it
            shares an instruction with the subtraction.
        maximum, total: maximum and sum of each row so far.
        MAY_BE_EMPTY: whether a row may have no score above −inf yet.
        NATURAL: whether the scores are natural or in units of log2.
    """
    largest = tl.max(scores, AXIS)
    if factor is not None:
        largest = largest * factor
    maximum_new = tl.maximum(maximum, largest)
    peak = finite_or_zero(maximum_new) if MAY_BE_EMPTY else maximum_new
    if factor is not None:
        scores = scores * factor
    p = power(scores - tl.expand_dims(peak, AXIS), NATURAL)
    shrunk = power(maximum - peak, NATURAL)
    return p, shrunk, maximum_new, total * shrunk + tl.sum(p, AXIS)


@triton.jit
def row_divisor(total):
    """Return the divisor of a; 1 for a row without keys, whose total is 0."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def row_lse(maximum, total, NATURAL: tl.constexpr):
    """Return lse after the last tile, −inf for rows without keys, and its rest, the part that rounding took from it.

    Without the rest, lse would not show how many keys share a large score.
    """
    logarithm = tl.log(row_divisor(total))
    largest = maximum if NATURAL else maximum * LN_2
    finite = tl.where(total == 0.0, 0.0, largest)
    return largest + logarithm, finite - (finite + logarithm) + logarithm
