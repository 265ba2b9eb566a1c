"""The mean gradient γ of scores along α·z, 0 ≤ α ≤ 1, by adaptive Gauss–Legendre quadrature.

Σ_t z_t·γ_kt = f_k(z) − f_k(0), and the same holds on every interval of the path:
Σ_t z_t·∫_a^b ∂f_k/∂z (αz) dα = f_k(bz) − f_k(az), which two predictions give. An interval on which 8 nodes are not
accurate enough is therefore detected and halved, until the error of all intervals together is within 1 % of the largest
|f_k(z) − f_k(0)| or 256 nodes have been used. The gap that remains is reported.

Equal steps would not suffice: a head with norms over projections without biases changes abruptly near α = 0, and
pseudo-inverses are curved everywhere. A path on which 8 nodes suffice costs these and two predictions.

Dimension key: K scores, T embeddings, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskattn.distributed.shared import counted_once
from maskattn.distributed.transport import add_up, broadcast_first
from maskattn.explain.integrated import gauss_legendre
from maskattn.shapes import Float

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MOST_NODES", "NODES", "TOLERANCE", "PathGradient", "gradient_alone", "mean_gradient"]

NODES = 8
"""Nodes of each interval."""
TOLERANCE = 0.01
"""Tolerance of the gap, as a share of the largest difference of scores."""
MOST_NODES = 256

Scores = Callable[[Tensor], Float[Tensor, "K"]]

# A difference below this share of the scores themselves is rounding error: no interval is halved for it.
_ROUNDING = 1e-4
_SHORTEST = 2.0**-16
# An interval's share of the tolerance is its length, but at least this.
_LEAST_SHARE = 1 / 16


@dataclass(frozen=True)
class PathGradient:
    """γ, and how well it accounts for the scores.

    Attributes:
        gradient_KTC: γ; None where it was not asked for.
        products_KT: z·γ of each row.
        difference_K: f(z) − f(0).
        gap_K: f(z) − f(0) − Σ z·γ.
        nodes: number of gradients computed for each score, including those of intervals that were halved.
    """

    gradient_KTC: Float[Tensor, "K T C"] | None
    products_KT: Float[Tensor, "K T"]
    difference_K: Float[Tensor, "K"]
    gap_K: Float[Tensor, "K"]
    nodes: int


def mean_gradient(
    scores_of: Scores,
    z_TC: Float[Tensor, "T C"],
    *,
    nodes: int | None = None,
    keep: bool = True,
    group: ProcessGroup | None = None,
) -> PathGradient:
    """Compute γ along the whole path.

    Args:
        scores_of: embeddings (T, C) → scores (K,), differentiable.
        z_TC: the end of the path.
        nodes: nodes of the whole path, which is then not halved; None uses as many as necessary.
        keep: whether γ is kept: (K, T, C) numbers, and twice as many while intervals are halved.
        group: the process group over which the embeddings are divided, T of them being this process's; all processes
            compute the same scores. None if this process has all embeddings.
    """
    z = z_TC.detach()
    with torch.no_grad():
        start_K, end_K = scores_of(torch.zeros_like(z)), scores_of(z)
    difference_K = end_K - start_K
    allowed = TOLERANCE * _agreed(torch.maximum(difference_K.abs().max(), _ROUNDING * end_K.abs().max()), group)
    spent, total = 0, _Sums(None, z.new_zeros(len(end_K), len(z)))
    waiting = [(0.0, 1.0, start_K, end_K)]
    while waiting:
        begin, end, before_K, after_K = waiting.pop()
        interval = _sum(scores_of, z, _nodes(begin, end, nodes or NODES, z), keep, group)
        spent += nodes or NODES
        gap = _agreed((after_K - before_K - _total(interval.products_KT, group)).abs().max(), group)
        affordable = nodes is None and spent + NODES * (len(waiting) + 2) <= MOST_NODES
        if gap > allowed * max(end - begin, _LEAST_SHARE) and affordable and end - begin > _SHORTEST:
            del interval  # frees its memory before the next one is computed
            middle = (begin + end) / 2
            with torch.no_grad():
                middle_K = scores_of(middle * z)
            waiting += [(middle, end, middle_K, after_K), (begin, middle, before_K, middle_K)]
        else:
            total = total.plus(interval)
    gap_K = difference_K - _total(total.products_KT, group)
    return PathGradient(total.gradient_KTC, total.products_KT, difference_K, gap_K, spent)


@dataclass(frozen=True)
class _Sums:
    """The sums over one or several intervals of the path."""

    gradient_KTC: Tensor | None
    products_KT: Tensor

    def plus(self, other: _Sums) -> _Sums:
        products_KT = self.products_KT + other.products_KT
        if self.gradient_KTC is None or other.gradient_KTC is None:
            return _Sums(other.gradient_KTC, products_KT)
        return _Sums(self.gradient_KTC.add_(other.gradient_KTC), products_KT)


def gradient_alone(
    scores_of: Scores, z_TC: Float[Tensor, "T C"], *, keep: bool = True, group: ProcessGroup | None = None
) -> PathGradient:
    """Compute the gradient at z alone; its products do not sum to a difference. Arguments as in :func:`mean_gradient`.

    ``difference_K`` is the sum of the products and ``nodes`` is 0, so that the gap is 0.
    """
    found = _sum(scores_of, z_TC.detach(), [(1.0, 1.0)], keep, group)
    total_K = _total(found.products_KT, group)
    return PathGradient(found.gradient_KTC, found.products_KT, total_K, torch.zeros_like(total_K), 0)


def _total(products_KT: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sums over all embeddings of all processes."""
    own_K = products_KT.sum(dim=1)
    return own_K if group is None else add_up(own_K, group)


def _agreed(number: Tensor, group: ProcessGroup | None) -> float:
    """Return a number that decides what is computed next: process 0's, since rounding might make them differ."""
    return float(number if group is None else broadcast_first(number.clone(), group))


def _nodes(begin: float, end: float, count: int, like: Tensor) -> list[tuple[float, float]]:
    """Return the nodes and weights of the quadrature on [begin, end]."""
    at, weights = gauss_legendre(count, like.new_zeros((), dtype=torch.float64))
    length = end - begin
    return list(zip((begin + length * at).tolist(), (length * weights).tolist(), strict=True))


def _sum(
    scores_of: Scores, z_TC: Tensor, nodes: list[tuple[float, float]], keep: bool, group: ProcessGroup | None
) -> _Sums:
    """Sum weight · ∂f/∂z (node · z) one class at a time, so that only one class's gradient is held with the sums."""
    gradient_KTC: Tensor | None = None
    products_KT: Tensor | None = None
    for node, weight in nodes:
        leaf = (node * z_TC).requires_grad_()
        with torch.enable_grad():
            scores_K = scores_of(leaf)
            if group is not None:
                scores_K = counted_once(scores_K, group)
        K = len(scores_K)
        for c in range(K):
            (gradient_TC,) = torch.autograd.grad(scores_K[c], leaf, retain_graph=c + 1 < K, materialize_grads=True)
            if products_KT is None:
                products_KT = gradient_TC.new_zeros(K, len(gradient_TC))
                gradient_KTC = gradient_TC.new_zeros(K, *gradient_TC.shape) if keep else None
            products_KT[c].add_(torch.einsum("tc,tc->t", z_TC, gradient_TC), alpha=weight)
            if gradient_KTC is not None:
                gradient_KTC[c].add_(gradient_TC, alpha=weight)
    assert products_KT is not None, "there is a node, and a score"
    return _Sums(gradient_KTC, products_KT)
