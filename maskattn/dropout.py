"""Dropout of attention weights as a function of their position alone, so that all passes and tile sizes agree.

The random word of query i and key j (positions within their sequence; of a dense tensor, among the tokens that take
part), head h and sequence b is word j mod 4 of Philox-4×32-10 with the counter (i, j div 4, h, b) and the 64-bit seed
as its key. The weight is dropped where the word is below p·2³².

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_factors", "dropout_threshold", "new_seed"]

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed, (1,) int64, from torch's generator of the device, without synchronising; CUDA graphs record it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> int:
    """Return the threshold below which a random word drops its weight."""
    return min(round(dropout_p * 2**32), _WORD)


def dropout_factors(
    seed: Tensor, dropout_p: float, queries: Tensor, keys: Tensor, heads: Tensor, sequence: Tensor
) -> Tensor:
    """Compute the factors of the attention weights, 0 or 1/(1 − dropout_p), in float64 and the broadcast shape.

    Args:
        seed: (1,) int64.
        dropout_p: share of the weights that are dropped, in [0, 1).
        queries, keys, heads, sequence: ints ≥ 0 that broadcast against each other.
    """
    position = torch.broadcast_tensors(queries, keys, heads, sequence)
    query, key, head, batch = (x.to(torch.int64) for x in position)
    words = torch.stack(_philox(seed, query, key // 4, head, batch), dim=-1)
    word = words.gather(-1, (key % 4)[..., None])[..., 0]
    return (word >= dropout_threshold(dropout_p)).double() / (1 - dropout_p)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low word of a product of two 32-bit words, in halves that fit into 64 signed bits."""
    low_half = factor * (x & 0xFFFF)
    high_half = factor * (x >> 16) + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)
