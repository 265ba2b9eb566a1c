"""Whether a map can be trusted: is the score higher by what it calls important than by what it calls unimportant?

The model sees the most relevant fifth of the kept tokens (of a slide, tiles) alone, and the least relevant fifth alone.
Packing makes this exact, for the model sees nothing in place of the others, and cheap, since a prediction costs what
its tokens cost: a map takes 0.4 of one. With f the score, and D the same difference between two fifths that are drawn
at random, R times over,

    z = (f(most relevant fifth) − f(least relevant fifth)) / √mean(D²),
    passed: z ≥ 1.5,      contradicts: z ≤ −1.5,      weak: between.

The rule was chosen on maps whose truth is known (``bench/evidence/map_checks.py``). Dropping what is relevant from the
whole tells less where a model is sure, since no single part is needed then.

Where predictions are cheap, as a slide's are from its tiles, what the score loses when the most relevant 1, 5, 10 and
20 % are dropped, and as many at random, is told beside it.

Dimension key: M maps, N tokens or tiles of the grid, S subsets, R draws, Q shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_FIFTH = 0.2
_ENOUGH = 1.5
_TOKENS_AT_A_TIME = 8192


@dataclass(frozen=True)
class MapCheck:
    """The test of one map.

    Attributes:
        map_check: the verdict; "skipped" where there are fewer than three tokens.
        most_relevant_alone: the score from the most relevant fifth.
        least_relevant_alone: the score from the least relevant fifth.
        spread_at_random: the same difference between two fifths at random, root mean square over the draws.
        z: the difference in these.
        shares: of the kept tokens that were dropped too; none where predictions are dear.
        drop_most_relevant: what the score lost each time, f − f(without), when they were the most relevant.
        drop_at_random: the same for as many at random, mean over the draws.
    """

    map_check: Literal["passed", "weak", "contradicts", "skipped"]
    most_relevant_alone: float = 0.0
    least_relevant_alone: float = 0.0
    spread_at_random: float = 0.0
    z: float = 0.0
    shares: tuple[float, ...] = ()
    drop_most_relevant: tuple[float, ...] = ()
    drop_at_random: tuple[float, ...] = ()

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
    shares: Sequence[float] = SHARES,
    draws: int = 8,
    seed: int = 0,
) -> list[MapCheck]:
    """The test of each map.

    Args:
        relevance_MN: (M, N), the maps.
        keep_N: (N,) bool, what takes part.
        scores_of: the scores of subsets of it, (S, N) bool → (S, M), each map's score in its column.
        shares: that are dropped too; none of them, and each map and draw takes 0.4 predictions.
        draws: R, at least 1; they serve all maps.
        seed: of the draws.
    """
    M, kept = len(relevance_MN), int(keep_N.sum())
    if round(_FIFTH * kept) < 1:
        return [MapCheck("skipped")] * M
    generator = torch.Generator().manual_seed(seed)
    places = keep_N.nonzero()[:, 0]
    by_relevance = relevance_MN[:, places].argsort(dim=1, descending=True, stable=True).to(places.device)
    at_random = torch.stack([torch.randperm(kept, generator=generator) for _ in range(draws)]).to(places.device)
    orders = [_subsets(keep_N, places[order], shares) for order in torch.cat([by_relevance, at_random])]
    whole = [keep_N] if shares else []
    scores = scores_of(torch.stack([*whole, *(subset for order in orders for subset in order)])).double().cpu()
    of_orders = scores[len(whole) :].unflatten(0, (M + draws, -1))  # [M + R, 2 + Q, M]
    first, last = of_orders[:, 0], of_orders[:, 1]
    drops = scores[:1, None] - of_orders[:, 2:]  # [M + R, Q, M]
    spread_M = (first - last)[M:].square().mean(dim=0).sqrt()
    checks = []
    for m in range(M):
        most, least, spread = float(first[m, m]), float(last[m, m]), float(spread_M[m])
        z = (most - least) / spread if spread > 0 else 0.0
        dropped = tuple(drops[m, :, m].tolist()), tuple(drops[M:, :, m].mean(dim=0).tolist())
        checks.append(MapCheck(_verdict(z), most, least, spread, z, tuple(shares), *dropped))
    return checks


def check_tokens(
    model: VisionTransformer,
    tokens: PackedTokens,
    target: Target,
    relevance_MN: Float[Tensor, "M N"],
    *,
    shares: Sequence[float] = SHARES,
    draws: int = 8,
    seed: int = 0,
) -> list[MapCheck]:
    """The test of the maps of one image, or of one slide's tiles, by the model's own predictions.

    Args:
        model: the vision transformer, or slide encoder.
        tokens: one sequence, with which its first block starts.
        target: see :func:`maskattn.explain.targets.select_scores`; M scores.
        relevance_MN: (M, N), the maps, background among the N.
        shares, draws, seed: see :func:`check_maps`.
    """
    present_L = cast(Tensor, tokens.packing.row_of_token).view(-1) >= 0

    def scores_of(keep_SN: Tensor) -> Tensor:
        source_S = torch.zeros(len(keep_SN), dtype=torch.long, device=keep_SN.device)
        at_a_time = max(1, _TOKENS_AT_A_TIME // max(tokens.packing.total, 1))
        return predict_subsets(model, tokens, target, source_S, keep_SN, at_a_time)

    keep_N = present_L[tokens.num_prefix :]
    return check_maps(relevance_MN, keep_N, scores_of, shares=shares, draws=draws, seed=seed)


def _subsets(keep_N: Tensor, ordered: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """The first fifth of an order alone, its last fifth alone, and all without as many of the first as shares say."""
    fifth = round(_FIFTH * len(ordered))
    parts = []
    for alone in (ordered[:fifth], ordered[-fifth:]):
        part = torch.zeros_like(keep_N)
        part[alone] = True
        parts.append(part)
    for share in shares:
        part = keep_N.clone()
        part[ordered[: max(1, round(share * len(ordered)))]] = False
        parts.append(part)
    return parts


def _verdict(z: float) -> Literal["passed", "weak", "contradicts"]:
    return "passed" if z >= _ENOUGH else "contradicts" if z <= -_ENOUGH else "weak"
