"""Bootstrap intervals: bias-corrected and accelerated (BCa), over patients.

    z0 = Φ⁻¹(share of resamples below the value),  a = Σ d³ / (6 (Σ d²)^1.5),  d = mean − value without a group
    limits: the Φ(z0 + (z0 ± z) / (1 − a (z0 ± z))) quantiles of the resamples

Efron, Better bootstrap confidence intervals, JASA 1987; as scipy.stats.bootstrap has it. A percentile interval covers
too little where a metric is skewed near 1. A resample in which a metric is not defined, as where it lacks a class, is
left out and counted. Rows of one patient, as of a patient's slides, are a cluster: drawn together, and left out
together.

Dimension key: B resamples, P patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation.weighted import Values, Weighted

__all__ = ["LEVEL", "Distribution", "Estimate", "distribution_of", "draw_resamples", "estimate", "estimate_of"]

LEVEL = 0.95
_MOST_GROUPS = 400  # left out one at a time for the acceleration
_MOST_WEIGHTS = 2_000_000  # of a block: 16 MB, and a few times that in a metric
_LEAST_SHARE = 0.5  # of the resamples, below which there is no interval


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: of the patients; None where it is not defined.
        low: the interval's lower limit, None where there is no interval.
        high: its upper limit.
        dropped: resamples in which the metric is not defined.
        note: why there is no value or no interval; else empty.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    dropped: int = 0
    note: str = ""


@dataclass(frozen=True)
class Distribution:
    """The bootstrap's results for a metric.

    Attributes:
        value: of the patients.
        resampled: of the resamples in which it is defined.
        without: of the patients without each group of them.
        dropped: resamples in which it is not defined.
    """

    value: float
    resampled: Values
    without: Values
    dropped: int

    def __sub__(self, other: Distribution) -> Distribution:
        """The difference, of the same resamples; both must have all of them, see :func:`distribution_of`."""
        defined = np.isfinite(self.resampled) & np.isfinite(other.resampled)
        apart = self.resampled - other.resampled
        return Distribution(
            self.value - other.value, apart[defined], self.without - other.without, int((~defined).sum())
        )

    @property
    def correction(self) -> tuple[float, float]:
        """z0 and a."""
        from scipy.special import ndtri

        count = len(self.resampled)
        below = ((self.resampled < self.value).sum() + (self.resampled == self.value).sum() / 2) / count
        apart = self.without[np.isfinite(self.without)]
        apart = apart.mean() - apart if len(apart) else np.zeros(1)
        spread = (apart**2).sum() ** 1.5
        acceleration = (apart**3).sum() / (6 * spread) if spread > 0 else 0.0
        return float(ndtri(np.clip(below, 1 / (count + 1), count / (count + 1)))), float(acceleration)

    def limits(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval of the resamples."""
        from scipy.special import ndtr, ndtri

        bias, acceleration = self.correction
        ends = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
        shares = ndtr(bias + ends / (1 - acceleration * ends))
        low, high = np.quantile(self.resampled, shares)
        return float(low), float(high)

    def p_value(self) -> float:
        """The two-sided p-value of the value being 0: the level at which an end of the interval meets 0."""
        from scipy.special import ndtr, ndtri

        bias, acceleration = self.correction
        count = len(self.resampled)
        below = ((self.resampled < 0).sum() + (self.resampled == 0).sum() / 2) / count
        end = float(ndtri(np.clip(below, 1 / (count + 1), count / (count + 1)))) - bias
        z = end / (1 + acceleration * end) - bias
        return float(np.clip(2 * ndtr(-abs(z)), 2 / (count + 1), 1))


def draw_resamples(
    patients: int,
    count: int,
    seed: int,
    strata: NDArray[np.int64] | None = None,
    cluster_P: NDArray[np.int64] | None = None,
) -> Values:
    """(B, P) how often each patient is drawn in each resample.

    Args:
        patients: P.
        count: B.
        seed: of the draw.
        strata: (P,) what to draw within, so that each resample has as many of each; None = all together.
        cluster_P: (P,) from 0, which rows are drawn together, as many times each; their strata together are the
            cluster's. None: each row is drawn by itself.
    """
    if cluster_P is not None:
        clusters = int(cluster_P.max()) + 1
        kinds = None if strata is None else _kinds_of(clusters, cluster_P, strata)
        return draw_resamples(clusters, count, seed, kinds)[:, cluster_P]
    draw = np.random.default_rng(seed)
    weights_BP = np.empty((count, patients))
    kinds = np.zeros(patients, dtype=np.int64) if strata is None else strata
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        drawn = draw.integers(0, len(members), (count, len(members))) + np.arange(count)[:, None] * len(members)
        weights_BP[:, members] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return weights_BP


def _kinds_of(clusters: int, cluster_P: NDArray[np.int64], strata: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stratum of each cluster: which of the rows' strata it has."""
    has = np.zeros((clusters, int(strata.max()) + 1), dtype=bool)
    has[cluster_P, strata] = True
    return np.unique(has, axis=0, return_inverse=True)[1].reshape(-1)


def distribution_of(of: Weighted, weights_BP: Values, cluster_P: NDArray[np.int64] | None = None) -> Distribution:
    """The metric of the patients, of their resamples (NaN where it is not defined), and without each group.

    Args:
        of: the metric of resamples.
        weights_BP: the resamples, of :func:`draw_resamples`.
        cluster_P: as it was given there.
    """
    patients = weights_BP.shape[1]
    number_P = np.arange(patients) if cluster_P is None else cluster_P
    groups = min(int(number_P.max()) + 1, _MOST_GROUPS)
    # Neighbours in a table are alike, so that a group is of patients far from one another.
    left_out = number_P % groups
    without_GP = (left_out != np.arange(groups)[:, None]).astype(np.float64)
    return Distribution(float(of(np.ones((1, patients)))[0]), _in_blocks(of, weights_BP), _in_blocks(of, without_GP), 0)


def estimate(
    of: Weighted, weights_BP: Values, level: float = LEVEL, cluster_P: NDArray[np.int64] | None = None
) -> Estimate:
    """A metric with its interval.

    Args:
        of: the metric of resamples.
        weights_BP: the resamples, of :func:`draw_resamples`.
        level: of the interval.
        cluster_P: as it was given there.
    """
    return estimate_of(distribution_of(of, weights_BP, cluster_P), level)


def estimate_of(found: Distribution, level: float = LEVEL) -> Estimate:
    """A value with its interval, of what the bootstrap found."""
    if not np.isfinite(found.value):
        return Estimate(None, note="not defined of these patients")
    defined = found.resampled[np.isfinite(found.resampled)]
    total = len(found.resampled) + found.dropped
    dropped = total - len(defined)
    if len(defined) < _LEAST_SHARE * total:
        return Estimate(found.value, dropped=dropped, note="not defined in most resamples; there are too few patients")
    if np.ptp(defined) == 0:
        return Estimate(found.value, dropped=dropped, note="the same in every resample, of which no interval follows")
    kept = Distribution(found.value, defined, found.without, dropped)
    return Estimate(found.value, *kept.limits(level), dropped)


def _in_blocks(of: Weighted, weights_BP: Values) -> Values:
    height = max(1, _MOST_WEIGHTS // weights_BP.shape[1])
    blocks = [of(weights_BP[start : start + height]) for start in range(0, len(weights_BP), height)]
    return np.concatenate(blocks)
