"""Smooth CDAM: the mean CDAM of noisy copies of the last block's input.

The backbone runs once. Noise is added after it, so m copies cost m tails (last block, norm, head), run in batches.

Source: Brocki, Binda, Chung, arXiv 2312.02364.

Dimension key: B images, T packed tokens, M maps, m copies, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskattn.explain.explainer import TokenExplainer
from maskattn.explain.targets import Target
from maskattn.explain.token_scores import score_tokens
from maskattn.explain.token_subsets import batches, copies_at_once, repeat_tokens, target_of_copies
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Float

__all__ = ["SmoothCDAM", "check_counts"]


class SmoothCDAM(TokenExplainer):
    """The mean CDAM of m noisy copies of the last block's input.

    Gaussian noise is added to all tokens. Its standard deviation is ``noise`` times the range (max − min) of the
    image's values in that input.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        m: number of noisy copies.
        noise: standard deviation, as a fraction of the range.
        internal_batch_size: copies of images that go through the last block at a time, at least one copy of the whole
            batch; None takes as many as have 8,192 tokens together. It bounds the memory and does not change the
            result beyond rounding.

    Raises:
        TypeError, ValueError: the model cannot be explained, or a number is out of range.
    """

    def __init__(
        self, model: nn.Module, m: int = 50, noise: float = 0.05, *, internal_batch_size: int | None = None
    ) -> None:
        check_counts(m, internal_batch_size)
        if noise < 0:
            raise ValueError(f"noise must be a fraction of the range, at least 0, got noise={noise}")
        super().__init__(model)
        self.m = m
        self.noise = noise
        self.internal_batch_size = internal_batch_size

    def relevance(  # noqa: D102 (as of TokenExplainer)
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, generator: torch.Generator | None = None
    ) -> Tensor:
        B, x = tokens.packing.batch_size, tokens.rows_TC
        std_T1 = (self.noise * _range_of_images(tokens)).index_select(0, tokens.packing.sequence_of_token)[:, None]
        device = x.device if generator is None else generator.device
        total: Tensor | None = None
        for chunk in batches(self.m, copies_at_once(tokens, self.internal_batch_size)):
            copies = chunk.stop - chunk.start
            # One draw for each copy, so that the noise does not depend on the size of the batches.
            draws = [torch.randn(x.shape, generator=generator, device=device).to(x) for _ in range(copies)]
            noisy = torch.cat([x + std_T1 * draw for draw in draws])
            many = repeat_tokens(tokens, copies).with_rows(noisy)
            relevance, _ = score_tokens(model, many, target_of_copies(target, B))
            of_copies = relevance.unflatten(1, (copies, -1)).sum(dim=1)
            total = of_copies if total is None else total + of_copies
        assert total is not None, "m is at least 1"
        return total / self.m


def check_counts(m: int, internal_batch_size: int | None) -> None:
    """Refuse numbers of copies below 1.

    Raises:
        ValueError: one of them is below 1.
    """
    if m < 1 or (internal_batch_size is not None and internal_batch_size < 1):
        raise ValueError(
            f"m and internal_batch_size must be at least 1, got m={m}, internal_batch_size={internal_batch_size}"
        )


def _range_of_images(tokens: PackedTokens) -> Float[Tensor, "B"]:
    """Return max − min of each image's packed values."""
    x, image = tokens.rows_TC, tokens.packing.sequence_of_token
    largest, smallest = (
        x.new_zeros(tokens.packing.batch_size).scatter_reduce(0, image, values, how, include_self=False)
        for values, how in ((x.amax(dim=1), "amax"), (x.amin(dim=1), "amin"))
    )
    return largest - smallest
