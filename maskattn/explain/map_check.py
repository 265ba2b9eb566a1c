"""Whether a map can be trusted: does the score fall when what the map calls important is dropped?

Of the kept tokens (of a slide, tiles) the most relevant 1, 5, 10 and 20 % are dropped, and as many at random, a few
times over. Packing makes this exact: the model sees the tokens that are left and nothing in place of the others. With D
the drop of the score summed over the shares, and μ, σ the mean and standard deviation of D over R random draws,

    z = (D − μ) / (σ √(1 + 1/R)),      passed: z ≥ 2,      contradicts: z ≤ −2,      weak: between.

A map of noise passes about once in fourteen times with four draws (Student's distribution with R − 1 degrees).

Dimension key: M maps, N tokens or tiles of the grid, S subsets, R draws, Q shares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from maskattn.explain.targets import Target
from maskattn.explain.token_subsets import predict_subsets
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float

__all__ = ["SHARES", "MapCheck", "check_maps", "check_tokens"]

SHARES = (0.01, 0.05, 0.1, 0.2)
_ENOUGH = 2.0
_TOKENS_AT_A_TIME = 8192


@dataclass(frozen=True)
class MapCheck:
    """The test of one map.

    Attributes:
        map_check: the verdict; "skipped" where there are too few tokens to drop some and keep some.
        shares: of the kept tokens that were dropped.
        drop_most_relevant: what the score lost each time, f − f(without), when they were the most relevant.
        drop_at_random: the same for as many at random, mean over the draws.
        z: the sum of the former less that of the latter, in standard deviations of random draws.
    """

    map_check: Literal["passed", "weak", "contradicts", "skipped"]
    shares: tuple[float, ...] = SHARES
    drop_most_relevant: tuple[float, ...] = ()
    drop_at_random: tuple[float, ...] = ()
    z: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing has to be said."""
        return self.map_check in ("passed", "skipped")

    def as_json(self) -> dict[str, Any]:
        """The test as outputs carry it."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}


@torch.no_grad()
def check_maps(
    relevance_MN: Float[Tensor, "M N"],
    keep_N: Bool[Tensor, "N"],
    scores_of: Callable[[Bool[Tensor, "S N"]], Float[Tensor, "S M"]],
    *,
    draws: int = 4,
    seed: int = 0,
) -> list[MapCheck]:
    """The test of each map.

    Args:
        relevance_MN: (M, N), the maps.
        keep_N: (N,) bool, what takes part.
        scores_of: the scores of subsets of it, (S, N) bool → (S, M), each map's score in its column.
        draws: R, at least 2.
        seed: of the draws, which serve all maps.
    """
    M, kept = len(relevance_MN), int(keep_N.sum())
    counts = [max(1, round(share * kept)) for share in SHARES]
    if counts[-1] >= kept:
        return [MapCheck("skipped")] * M
    generator = torch.Generator().manual_seed(seed)
    places = keep_N.nonzero()[:, 0]
    by_relevance = relevance_MN[:, places].argsort(dim=1, descending=True, stable=True).to(places.device)
    at_random = torch.stack([torch.randperm(kept, generator=generator) for _ in range(draws)]).to(places.device)
    orders = torch.cat([by_relevance, at_random])  # [M + R, kept]
    subsets = keep_N.repeat(1 + len(orders) * len(counts), 1)
    for row, (order, count) in enumerate(((order, count) for order in orders for count in counts), start=1):
        subsets[row, places[order[:count]]] = False
    scores = scores_of(subsets).double().cpu()
    drops = (scores[:1] - scores[1:]).unflatten(0, (len(orders), len(counts)))  # [M + R, Q, M]
    checks = []
    for m in range(M):
        own, random = drops[m, :, m], drops[M:, :, m]
        totals = random.sum(dim=1)
        spread = float(totals.std()) * (1 + 1 / draws) ** 0.5
        difference = float(own.sum() - totals.mean())
        z = difference / spread if spread > 0 else 0.0
        verdict: Any = "passed" if z >= _ENOUGH else "contradicts" if z <= -_ENOUGH else "weak"
        checks.append(MapCheck(verdict, SHARES, tuple(own.tolist()), tuple(random.mean(dim=0).tolist()), z))
    return checks


def check_tokens(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    relevance_MN: Float[Tensor, "M N"],
    *,
    draws: int = 4,
    seed: int = 0,
) -> list[MapCheck]:
    """The test of the maps of one image, or of one slide's tiles, by the model's own predictions.

    Args:
        model: the vision transformer, or slide encoder.
        tokens: one sequence, with which its first block starts.
        target: see :func:`maskattn.explain.targets.select_scores`; M scores.
        relevance_MN: (M, N), the maps, background among the N.
        draws, seed: see :func:`check_maps`.
    """
    present_L = cast(Tensor, tokens.packing.row_of_token).view(-1) >= 0

    def scores_of(keep_SN: Tensor) -> Tensor:
        source_S = torch.zeros(len(keep_SN), dtype=torch.long, device=keep_SN.device)
        at_a_time = max(1, _TOKENS_AT_A_TIME // max(tokens.packing.total, 1))
        return predict_subsets(model, tokens, target, source_S, keep_SN, at_a_time)

    return check_maps(relevance_MN, present_L[tokens.num_prefix :], scores_of, draws=draws, seed=seed)
