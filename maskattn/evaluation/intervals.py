"""Bootstrap intervals: bias-corrected and accelerated (BCa), over patients.

    z0 = Φ⁻¹(share of resamples below the value),  a = Σ d³ / (6 (Σ d²)^1.5),  d = mean − value without a group
    limits: the Φ(z0 + (z0 ± z) / (1 − a (z0 ± z))) quantiles of the resamples

Source: Efron, Better bootstrap confidence intervals, JASA 1987; the results are those of scipy.stats.bootstrap. A
percentile interval would undercover if a metric is skewed near 1. A resample in which a metric is undefined, for
example because a class is missing, is left out and counted. The rows of one patient, such as the patient's slides, form
a cluster: they are drawn together, and left out together.

Dimension key: B resamples, P patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskattn.evaluation.weighted import Values, Weighted

__all__ = ["LEVEL", "Distribution", "Estimate", "distribution_of", "draw_resamples", "estimate", "estimate_of"]

LEVEL = 0.95
_MOST_GROUPS = 400  # groups of patients that are left out one at a time for the acceleration
_MOST_WEIGHTS = 2_000_000  # weights in a block: 16 MB, and a few times that in a metric
_LEAST_SHARE = 0.5  # share of the resamples with a defined metric below which there is no interval


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: the metric of the patients; None if undefined.
        low: the interval's lower limit; None if there is no interval.
        high: the interval's upper limit; None if there is no interval.
        dropped: number of resamples in which the metric is undefined.
        note: the reason why there is no value or no interval; otherwise empty.
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
        value: the metric of the patients.
        resampled: its values in the resamples.
        without: its values without each group of patients (the jackknife).
        dropped: number of resamples that are left out because it is undefined.
    """

    value: float
    resampled: Values
    without: Values
    dropped: int

    def __sub__(self, other: Distribution) -> Distribution:
        """Return the distribution of the difference; both must have the same resamples, of :func:`distribution_of`."""
        defined = np.isfinite(self.resampled) & np.isfinite(other.resampled)
        difference = self.resampled - other.resampled
        return Distribution(
            self.value - other.value, difference[defined], self.without - other.without, int((~defined).sum())
        )

    @property
    def correction(self) -> tuple[float, float]:
        """The bias correction z0 and the acceleration a."""
        from scipy.special import ndtri

        count = len(self.resampled)
        below = ((self.resampled < self.value).sum() + (self.resampled == self.value).sum() / 2) / count
        without = self.without[np.isfinite(self.without)]
        deviations = without.mean() - without if len(without) else np.zeros(1)
        spread = (deviations**2).sum() ** 1.5
        acceleration = (deviations**3).sum() / (6 * spread) if spread > 0 else 0.0
        return float(ndtri(np.clip(below, 1 / (count + 1), count / (count + 1)))), float(acceleration)

    def limits(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the limits of the BCa interval."""
        from scipy.special import ndtr, ndtri

        bias, acceleration = self.correction
        ends = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
        shares = ndtr(bias + ends / (1 - acceleration * ends))
        low, high = np.quantile(self.resampled, shares)
        return float(low), float(high)

    def p_value(self) -> float:
        """Return the two-sided p value of a value of 0: the level at which an end of the interval touches 0."""
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
    """Draw resamples, as (B, P) counts of how often each patient is drawn.

    Args:
        patients: P.
        count: B.
        seed: seed of the draw.
        strata: (P,) strata within which patients are drawn, so that each resample has the same number of each; None
            draws from all.
        cluster_P: (P,) index from 0 of the cluster of each row; the rows of a cluster are drawn together, and its
            stratum is the set of their strata. None draws each row separately.
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
    """Return the stratum of each cluster: the set of its rows' strata, as an index."""
    has = np.zeros((clusters, int(strata.max()) + 1), dtype=bool)
    has[cluster_P, strata] = True
    return np.unique(has, axis=0, return_inverse=True)[1].reshape(-1)


def distribution_of(of: Weighted, weights_BP: Values, cluster_P: NDArray[np.int64] | None = None) -> Distribution:
    """Compute the metric of the patients, of their resamples (NaN if undefined), and without each group of patients.

    Args:
        of: the metric as a function of resamples.
        weights_BP: the resamples of :func:`draw_resamples`.
        cluster_P: the clusters given there.
    """
    patients = weights_BP.shape[1]
    index_P = np.arange(patients) if cluster_P is None else cluster_P
    groups = min(int(index_P.max()) + 1, _MOST_GROUPS)
    # Neighbouring rows of a table may be similar, so a group takes patients that are far apart.
    left_out = index_P % groups
    without_GP = (left_out != np.arange(groups)[:, None]).astype(np.float64)
    return Distribution(float(of(np.ones((1, patients)))[0]), _in_blocks(of, weights_BP), _in_blocks(of, without_GP), 0)


def estimate(
    of: Weighted, weights_BP: Values, level: float = LEVEL, cluster_P: NDArray[np.int64] | None = None
) -> Estimate:
    """Estimate a metric with its interval.

    Args:
        of: the metric as a function of resamples.
        weights_BP: the resamples of :func:`draw_resamples`.
        level: confidence level of the interval.
        cluster_P: the clusters given there.
    """
    return estimate_of(distribution_of(of, weights_BP, cluster_P), level)


def estimate_of(found: Distribution, level: float = LEVEL) -> Estimate:
    """Return the value and the interval of a bootstrap distribution."""
    if not np.isfinite(found.value):
        return Estimate(None, note="not defined for these patients")
    defined = found.resampled[np.isfinite(found.resampled)]
    total = len(found.resampled) + found.dropped
    dropped = total - len(defined)
    if len(defined) < _LEAST_SHARE * total:
        return Estimate(found.value, dropped=dropped, note="not defined in most resamples; there are too few patients")
    if np.ptp(defined) == 0:
        return Estimate(found.value, dropped=dropped, note="the same in every resample, which gives no interval")
    kept = Distribution(found.value, defined, found.without, dropped)
    return Estimate(found.value, *kept.limits(level), dropped)


def _in_blocks(of: Weighted, weights_BP: Values) -> Values:
    height = max(1, _MOST_WEIGHTS // weights_BP.shape[1])
    blocks = [of(weights_BP[start : start + height]) for start in range(0, len(weights_BP), height)]
    return np.concatenate(blocks)
