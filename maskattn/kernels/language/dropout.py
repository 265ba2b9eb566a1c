"""The choice of dropped weights by counter-based random words, so that every pass drops the same ones.

Dimension key: M queries of a tile, N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskattn.kernels.language.bundles import Noise

__all__ = ["dropout_factors", "load_noise", "moved_words", "multiply_words", "random_words"]


@triton.jit
def load_noise(dropout, head, sequence):
    """Load the values that all random words of a program share."""
    seed = tl.load(dropout.seed_ptr).to(tl.uint64, bitcast=True)
    threshold = tl.cast(dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    query_offset, key_offset = None, None
    if dropout.query_offsets_ptr is not None:
        query_offset = tl.load(dropout.query_offsets_ptr + sequence)
    if dropout.key_offsets_ptr is not None:
        key_offset = tl.load(dropout.key_offsets_ptr + sequence)
    return Noise(
        low, high, threshold, dropout.factor, head.to(tl.uint32), sequence.to(tl.uint32), query_offset, key_offset
    )


@triton.jit
def multiply_words(a, b):
    """Return the high and the low word of the product of two 32-bit words."""
    # A single 64-bit product compiles to one instruction.
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_words(low, high, c0, c1, c2, c3):
    """Compute Philox-4×32-10, four words for each counter; ``maskattn.dropout`` gives the source."""
    for _ in tl.static_range(10):
        high0, low0 = multiply_words(c0, 0xD2511F53)
        high1, low1 = multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ low, low1, high0 ^ c3 ^ high, low0
        low = tl.add(low, 0x9E3779B9, sanitize_overflow=False)
        high = tl.add(high, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def moved_words(by, w0, w1, w2, w3, following):
    """Return four consecutive words of these four and the four that follow, from word ``by``, 0 to 3, on."""
    # By one word, then by two.
    odd, far = by % 2 == 1, by >= 2
    w0, w1, w2, w3, w4, w5 = (
        tl.where(odd, w1, w0),
        tl.where(odd, w2, w1),
        tl.where(odd, w3, w2),
        tl.where(odd, following[0], w3),
        tl.where(odd, following[1], following[0]),
        tl.where(odd, following[2], following[1]),
    )
    return tl.where(far, w2, w0), tl.where(far, w3, w1), tl.where(far, w4, w2), tl.where(far, w5, w3)


@triton.jit
def dropout_factors(
    noise, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Return 0 or 1/(1 − dropout_p) for each weight of a tile, [M, N] or transposed.

    ``first_key``, as without offsets a multiple of 4, is that within the chunk. A chunk that starts at any other key
    cuts the groups of four, so that each group of its keys needs the words of two.
    """
    queries = first_query + tl.arange(0, BLOCK_M)
    groups = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    if noise.query_offset is not None:
        queries += noise.query_offset
    if noise.key_offset is not None:
        groups += noise.key_offset // 4
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
    if noise.key_offset is not None:
        following = random_words(
            noise.low, noise.high, zero + query, zero + group + 1, zero + noise.head, zero + noise.sequence
        )
        w0, w1, w2, w3 = moved_words(noise.key_offset % 4, w0, w1, w2, w3, following)
    # [..., 2, 2], the word of key 4g + 2x + y at [g, x, y].
    kept = tl.join(
        tl.join(w0 >= noise.threshold, w2 >= noise.threshold), tl.join(w1 >= noise.threshold, w3 >= noise.threshold)
    )
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        kept = tl.reshape(kept, [BLOCK_M, BLOCK_N])
    return tl.where(kept, noise.factor, 0.0)
