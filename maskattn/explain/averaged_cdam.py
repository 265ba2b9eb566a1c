"""CDAM averaged over variants of the last block's input: Smooth over noise, Integrated along a path.

The backbone runs once. What varies lies behind it, so m variants cost m tails (last block, norm, head), run in batches.

Source: Brocki, Binda, Chung, arXiv 2312.02364, for Smooth and for the path "input"; the path "norm" is this package's.

Dimension key: B images, T packed tokens, M maps, m variants, C channels, H·W grid tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from maskattn.explain.captum_calls import CaptumCalls, as_captum_calls
from maskattn.explain.cdam import as_maps, model_and_tokens, squeeze_maps
from maskattn.explain.last_block import input_of_attention, output_from, reads_class_token_alone
from maskattn.explain.packed_model import packed_model
from maskattn.explain.targets import Target, gives_one_map, select_scores
from maskattn.explain.token_scores import score_class_token_queries, score_tokens
from maskattn.explain.token_subsets import batches, repeat_tokens
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float

__all__ = ["IntegratedCDAM", "SmoothCDAM"]


class SmoothCDAM(CaptumCalls):
    """The mean CDAM of m noisy copies of the last block's input.

    The noise is Gaussian, on all tokens, its standard deviation ``noise`` times the range (max − min) of an image's
    values there.

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
        m: noisy copies.
        noise: standard deviation, as a share of the range.
        internal_batch_size: copies of images in the last block at a time, at least one of the whole batch; bounds the
            memory, and leaves the result as it is but for rounding.

    Raises:
        TypeError, ValueError: the model cannot be explained, or a number is out of range.
    """

    def __init__(self, model: nn.Module, m: int = 50, noise: float = 0.05, *, internal_batch_size: int = 64) -> None:
        _check_counts(m, internal_batch_size)
        if noise < 0:
            raise ValueError(f"noise must be a share of the range, at least 0, got noise={noise}")
        self.model = packed_model(model)
        self.m = m
        self.noise = noise
        self.internal_batch_size = internal_batch_size

    @as_captum_calls
    def attribute(
        self,
        inputs: Float[Tensor, "B I X Y"],
        target: Target,
        keep: Bool[Tensor, "..."] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "..."]:
        """Explain a prediction. Arguments and results as of :meth:`maskattn.explain.CDAM.attribute`.

        Args:
            inputs, target, keep: see there.
            generator: source of the noise, on any device; None takes torch's own.
        """
        model, tokens = model_and_tokens(self.model, inputs, target, keep)
        B, x = tokens.packing.batch_size, tokens.rows_TC
        std_T1 = (self.noise * _range_of_images(tokens)).index_select(0, tokens.packing.sequence_of_token)[:, None]
        device = x.device if generator is None else generator.device
        total: Tensor | float = 0.0
        for part in batches(self.m, max(1, self.internal_batch_size // max(B, 1))):
            copies = part.stop - part.start
            # One draw for each copy, so that the noise does not depend on the size of the batches.
            draws = [torch.randn(x.shape, generator=generator, device=device).to(x) for _ in range(copies)]
            noisy = torch.cat([x + std_T1 * draw for draw in draws])
            many = repeat_tokens(tokens, copies).with_rows(noisy)
            relevance, scores = score_tokens(model, many, target_of_copies(target, B))
            total = total + relevance.unflatten(1, (copies, -1)).sum(dim=1)
        assert isinstance(total, Tensor)
        return squeeze_maps(as_maps(total / self.m, tokens), target, scores)


class IntegratedCDAM(CaptumCalls):
    """CDAM averaged along a straight path from zero to the prediction.

    Two paths. "input" is the authors': the last block's input is scaled by k/m, k = 1 … m, and T is its norm; the norm
    undoes the scaling, so that T hardly moves and the map sums to nothing in particular. "norm" scales T itself, at
    the nodes of Gauss–Legendre quadrature, and is Integrated Gradients in T with a baseline of 0: the scores of all
    tokens sum to f(T) − f(0).

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
        m: steps of the path.
        path: "input" or "norm".
        internal_batch_size: as for :class:`SmoothCDAM`.

    Raises:
        TypeError, ValueError: the model cannot be explained, a number is out of range, or there is no such path.
    """

    def __init__(
        self,
        model: nn.Module,
        m: int = 50,
        path: Literal["input", "norm"] = "input",
        *,
        internal_batch_size: int = 64,
    ) -> None:
        _check_counts(m, internal_batch_size)
        if path not in ("input", "norm"):
            raise ValueError(f"path must be 'input' or 'norm', got path={path!r}")
        self.model = packed_model(model)
        self.m = m
        self.path = path
        self.internal_batch_size = internal_batch_size

    @as_captum_calls
    def attribute(
        self,
        inputs: Float[Tensor, "B I X Y"],
        target: Target,
        keep: Bool[Tensor, "..."] | None = None,
        *,
        return_convergence_gap: bool = False,
    ) -> Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Explain a prediction. Arguments and results as of :meth:`maskattn.explain.CDAM.attribute`.

        Args:
            inputs, target, keep: see there.
            return_convergence_gap: with the path "norm", also return f(T) − f(0) − Σ_i S_i, the sum over all tokens,
                prefix tokens too: (B,), or (B, M) for several maps. It shrinks as m grows.

        Raises:
            TypeError, ValueError: inputs, target or keep do not fit the model, or the path has no convergence gap.
        """
        if return_convergence_gap and self.path != "norm":
            raise ValueError(
                "the path 'input' does not converge to a difference of scores, so it has no convergence gap; "
                "use IntegratedCDAM(path='norm')"
            )
        model, tokens = model_and_tokens(self.model, inputs, target, keep)
        B = tokens.packing.batch_size
        with torch.no_grad():
            normed = input_of_attention(model, tokens)
        nodes, weights = self._quadrature(tokens.rows_TC)
        total: Tensor | float = 0.0
        queries: Tensor | float = 0.0
        for part in batches(self.m, max(1, self.internal_batch_size // max(B, 1))):
            alphas, per_copy = nodes[part], target_of_copies(target, B)
            many = repeat_tokens(tokens, len(alphas))
            scaled: Tensor | None = None
            if self.path == "norm":
                scaled = torch.cat([alpha * normed for alpha in alphas])
            else:
                many = many.with_rows(torch.cat([alpha * tokens.rows_TC for alpha in alphas]))
            relevance, scores = score_tokens(model, many, per_copy, scaled)
            by_copy = relevance.unflatten(1, (len(alphas), -1))
            total = total + torch.einsum("m,cmt->ct", weights[part].to(relevance), by_copy)
            if return_convergence_gap and scaled is not None and reads_class_token_alone(model):
                parts = score_class_token_queries(model, many, per_copy, scaled).unflatten(0, (len(alphas), B))
                queries = queries + torch.einsum("m,mbc->bc", weights[part].to(parts), parts)
        assert isinstance(total, Tensor)
        maps = squeeze_maps(as_maps(total, tokens), target, scores)
        if not return_convergence_gap:
            return maps
        gap_BM = _difference(model, tokens, normed, target) - _sum_of_images(total, tokens) - queries
        return maps, gap_BM[:, 0] if gives_one_map(target, gap_BM) else gap_BM

    def _quadrature(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scales α and weights of T_α·∂f/∂T; on the path "norm" the weights divide by α, so that T_α stands for T."""
        if self.path == "input":
            nodes = torch.arange(1, self.m + 1, device=like.device, dtype=torch.float64) / self.m
            return nodes.to(like), torch.full_like(nodes, 1 / self.m)
        at, weight = np.polynomial.legendre.leggauss(self.m)
        nodes = torch.from_numpy((at + 1) / 2).to(like.device)
        return nodes.to(like), torch.from_numpy(weight / 2).to(like.device) / nodes


def target_of_copies(target: Target, batch_size: int) -> Target:
    """The target of each copy of a batch, where copies lie one behind the other."""

    def scores(output: Tensor) -> Tensor:
        return torch.cat([select_scores(copy, target) for copy in output.split(batch_size)])

    return scores


@torch.no_grad()
def _difference(model: VisionTransformer, tokens: PackedTokens, normed: Tensor, target: Target) -> Tensor:
    """f(T) − f(0), (B, M)."""

    def scores(at: Tensor) -> Tensor:
        block = model.last_block
        if not reads_class_token_alone(model):
            return select_scores(output_from(model, tokens, at), target)
        read = block.read_attention(tokens, at).out_B1HD
        return select_scores(model.predict_from_class_token(block.finish(tokens, read)), target)

    return scores(normed) - scores(torch.zeros_like(normed))


def _sum_of_images(values_MT: Tensor, tokens: PackedTokens) -> Float[Tensor, "B M"]:
    sums = values_MT.new_zeros(tokens.packing.batch_size, len(values_MT))
    return sums.index_add_(0, tokens.packing.sequence_of_token, values_MT.T)


def _range_of_images(tokens: PackedTokens) -> Float[Tensor, "B"]:
    """max − min of each image's packed values."""
    x, image = tokens.rows_TC, tokens.packing.sequence_of_token
    largest, smallest = (
        x.new_zeros(tokens.packing.batch_size).scatter_reduce(0, image, values, how, include_self=False)
        for values, how in ((x.amax(dim=1), "amax"), (x.amin(dim=1), "amin"))
    )
    return largest - smallest


def _check_counts(m: int, internal_batch_size: int) -> None:
    if m < 1 or internal_batch_size < 1:
        raise ValueError(
            f"m and internal_batch_size must be at least 1, got m={m}, internal_batch_size={internal_batch_size}"
        )
