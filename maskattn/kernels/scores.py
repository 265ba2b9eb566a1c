"""What becomes of q·k: scale, key bias, two-dimensional ALiBi, the online softmax and dropout.

Scores are kept in units of log2, with log2(e) folded into the scale and the slopes, because exp2 is what the hardware
has. Those with a key bias, and all of a readout, are *natural*: kept as they are and turned into units of log2 once the
largest is subtracted, so that a large bias is not rounded by a factor, does not overflow and costs no more digits than
float32 must. For a query row with running maximum m, sum l and accumulator a, a tile of scores s updates

    m' = max(m, max s)      p = 2^(s − m')      l' = l·2^(m − m') + Σ p      a' = a·2^(m − m') + p·V

Dimension key: M queries of a tile, N keys of a tile; R × C is M × N, or N × M where a kernel works on the transpose.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.arguments import Noise
from maskattn.kernels.tiles import INTERPRETING, LOG2_E, tile_offsets

__all__ = ["distances", "dropout_factors", "exponential", "in_units", "load_noise", "load_places", "softmax_update"]


@triton.jit
def load_places(base_ptr, first, rows, stride_t, stride_c, inside, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """The two coordinates of each row of a tile: [BLOCK], [BLOCK]."""
    shift, offsets = tile_offsets(first, rows, stride_t, INDEXED)
    pointers = base_ptr + shift + offsets
    if PARTIAL:
        x = tl.load(pointers, mask=inside, other=0.0)
        y = tl.load(pointers + stride_c, mask=inside, other=0.0)
    else:
        x = tl.load(pointers)
        y = tl.load(pointers + stride_c)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def in_units(x, NATURAL: tl.constexpr):
    """A factor of the scores in their units."""
    return x if NATURAL else x * LOG2_E


@triton.jit
def exponential(difference):
    """e to the power of a difference of natural scores: on hardware a product and exp2."""
    return tl.exp(difference)


@triton.jit
def power(difference, NATURAL: tl.constexpr):
    """e to the power of a difference of scores, whatever their units."""
    return exponential(difference) if NATURAL else tl.exp2(difference)


@triton.jit
def distances(rows, columns):
    """Distances of the places (x, y) of rows from those of columns, [R, C]; 0 from what has no place."""
    # [R, C]
    dx = rows[0][:, None] - columns[0][None, :]
    dy = rows[1][:, None] - columns[1][None, :]
    squared = dx * dx + dy * dy
    # On hardware the maximum of NaN and 0 is 0, at half the price of a choice; the interpreter's is NaN.
    squared = tl.where(squared == squared, squared, 0.0) if INTERPRETING else tl.maximum(squared, 0.0)
    return tl.sqrt(squared)


@triton.jit
def load_noise(dropout, head, sequence):
    """What the random words of a program have in common."""
    seed = tl.load(dropout.seed_ptr).to(tl.uint64, bitcast=True)
    threshold = tl.cast(dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    return Noise(low, high, threshold, dropout.factor, head.to(tl.uint32), sequence.to(tl.uint32))


@triton.jit
def multiply_words(a, b):
    """High and low word of the product of two 32-bit words."""
    # One instruction where the compiler sees one product.
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_words(low, high, c0, c1, c2, c3):
    """Philox-4×32-10: four words for each counter; ``maskattn.dropout`` has the source."""
    for _ in tl.static_range(10):
        high0, low0 = multiply_words(c0, 0xD2511F53)
        high1, low1 = multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ low, low1, high0 ^ c3 ^ high, low0
        low = tl.add(low, 0x9E3779B9, sanitize_overflow=False)
        high = tl.add(high, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def dropout_factors(
    noise, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """0 or 1/(1 − dropout_p) for each weight of a tile, [M, N] or transposed."""
    queries = first_query + tl.arange(0, BLOCK_M)
    groups = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    if TRANSPOSED:
        # [N / 4, M]
        zero = tl.zeros([BLOCK_N // 4, BLOCK_M], tl.uint32)
        query, group = queries[None, :].to(tl.uint32), groups[:, None].to(tl.uint32)
    else:
        # [M, N / 4]
        zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
        query, group = queries[:, None].to(tl.uint32), groups[None, :].to(tl.uint32)
    w0, w1, w2, w3 = random_words(
        noise.low, noise.high, zero + query, zero + group, zero + noise.head, zero + noise.sequence
    )
    # [..., 2, 2], the word of key 4g + 2x + y at [g, x, y].
    kept = tl.join(
        tl.join(w0 >= noise.threshold, w2 >= noise.threshold), tl.join(w1 >= noise.threshold, w3 >= noise.threshold)
    )
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        kept = tl.reshape(kept, [BLOCK_M, BLOCK_N])
    return tl.where(kept, noise.factor, 0.0)


@triton.jit
def softmax_update(
    qk,
    maximum,
    total,
    scale,
    bias,
    inside,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    penalty=0.0,
    HAS_PENALTY: tl.constexpr = False,
):
    """One step of the online softmax: p [M, N], the factor of what went before [M], the new maximum and sum [M].

    Subtracts ``penalty`` [M, N], adds ``bias`` [N]; all in units of the scores, which are natural with a bias.
    """
    if HAS_BIAS or HAS_PENALTY or PARTIAL:
        scores = qk * scale
        if HAS_PENALTY:
            scores -= penalty
        if HAS_BIAS:
            scores += bias[None, :]
        if PARTIAL:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        maximum_new = tl.maximum(maximum, tl.max(scores, 1))
        peak = maximum_new
        if HAS_BIAS:
            # A bias of −inf may leave a row without a score so far: −inf − (−inf) would be NaN.
            peak = tl.where(maximum_new == float("-inf"), 0.0, maximum_new)
        p = power(scores - peak[:, None], HAS_BIAS)
    else:
        # The scale is positive, so it commutes with the maximum, and scaling and subtracting are one FMA.
        maximum_new = tl.maximum(maximum, tl.max(qk, 1) * scale)
        peak = maximum_new
        p = tl.exp2(qk * scale - peak[:, None])
    factor = power(maximum - peak, HAS_BIAS)
    return p, factor, maximum_new, total * factor + tl.sum(p, 1)
