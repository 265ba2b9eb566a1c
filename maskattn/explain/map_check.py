"""The map check: does the score agree with the map about what is important and what is not?

The model sees only the most relevant fifth of the kept tokens (of a slide: tiles), then only the least relevant fifth.
Packing makes this exact, because nothing is put in place of the other tokens, and cheap, because a prediction costs
what its tokens cost: a map takes 0.4 predictions. Let f be the score and D the same difference between two random
fifths, drawn R times. Then

    z = (f(most relevant fifth) − f(least relevant fifth)) / √mean(D²),
    passed: z ≥ 1.5,      contradicts: z ≤ −1.5,      weak: between.

The rule was chosen on maps with known ground truth (``bench/evidence/map_checks.py``). Dropping the most relevant
tokens is less informative for a confident model, whose prediction needs no single one of them.

If predictions are cheap, as a slide's are from its tiles, the loss of score when the most relevant 1, 5, 10 and 20 %
are dropped, and when as many are dropped at random, is reported as well.

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
    """The check of one map.

    Attributes:
        map_check: the verdict; "skipped" if there are fewer than three tokens.
        most_relevant_alone: the score from the most relevant fifth.
        least_relevant_alone: the score from the least relevant fifth.
        spread_at_random: root mean square, over the draws, of the difference between two random fifths.
        z: the difference between the two scores, in units of ``spread_at_random``.
        shares: shares of the kept tokens that were dropped; empty if predictions are expensive.
        drop_most_relevant: loss of score f − f(without) for each share, dropping the most relevant tokens.
        drop_at_random: the same loss for as many random tokens, mean over the draws.
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
        """Whether the map needs no warning: the verdict is "passed" or "skipped"."""
        return self.map_check in ("passed", "skipped")

    def as_json(self) -> dict[str, Any]:
        """Return the check as a JSON object."""
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
    """Check each map.

    Args:
        relevance_MN: (M, N), the maps.
        keep_N: (N,) bool, the tokens that take part.
        scores_of: the scores of subsets of the kept tokens, (S, N) bool → (S, M), each map's score in its column.
        shares: shares to drop as well; without any, each map and draw takes 0.4 predictions.
        draws: R, at least 1; all maps share them.
        seed: seed of the draws.
    """
    M, kept = len(relevance_MN), int(keep_N.sum())
    if round(_FIFTH * kept) < 1:
        return [MapCheck("skipped")] * M
    generator = torch.Generator().manual_seed(seed)
    positions = keep_N.nonzero()[:, 0]
    by_relevance = relevance_MN[:, positions].argsort(dim=1, descending=True, stable=True).to(positions.device)
    at_random = torch.stack([torch.randperm(kept, generator=generator) for _ in range(draws)]).to(positions.device)
    orders = [_subsets(keep_N, positions[order], shares) for order in torch.cat([by_relevance, at_random])]
    everything = [keep_N] if shares else []
    scores = scores_of(torch.stack([*everything, *(subset for order in orders for subset in order)])).double().cpu()
    of_orders = scores[len(everything) :].unflatten(0, (M + draws, -1))  # [M + R, 2 + Q, M]
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
    """Check the maps of one image, or of one slide's tiles, by the model's own predictions.

    Args:
        model: the vision transformer, or slide encoder.
        tokens: one sequence, the input of the model's first block.
        target: see :func:`maskattn.explain.targets.select_scores`; M scores.
        relevance_MN: (M, N), the maps, background included.
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
    """Return the first fifth of an order, its last fifth, and, for each share, all but that share of the first ones."""
    fifth = round(_FIFTH * len(ordered))
    subsets = []
    for alone in (ordered[:fifth], ordered[-fifth:]):
        subset = torch.zeros_like(keep_N)
        subset[alone] = True
        subsets.append(subset)
    for share in shares:
        subset = keep_N.clone()
        subset[ordered[: max(1, round(share * len(ordered)))]] = False
        subsets.append(subset)
    return subsets


def _verdict(z: float) -> Literal["passed", "weak", "contradicts"]:
    return "passed" if z >= _ENOUGH else "contradicts" if z <= -_ENOUGH else "weak"
