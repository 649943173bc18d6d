"""95% intervals and paired tests for metrics of clustered items: pairs, or responses, that share a prompt.

Items of one prompt resemble each other, so prompts are resampled, not single items. Results depend only on the
data and the seed.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

RESAMPLES = 2000
FLIPS = 9999
CHUNK_SIZE = 2**22  # weights or signs in memory: 32 MB. The statistics use a few times that.

Numbers = NDArray[np.float64]
Statistic = Callable[[Numbers], Numbers]
"""Maps weights [B, N], the number of times that each of N items is in each of B resamples, to B values."""


def total(values: ArrayLike) -> Statistic:
    """Return the weighted sum of N values."""
    data = np.asarray(values, float)
    return lambda weights: weights @ data


def over(numerator: Statistic, denominator: Statistic) -> Statistic:
    """Divide one statistic by another; NaN if the divisor is 0."""

    def statistic(weights: Numbers) -> Numbers:
        divisors = denominator(weights)
        return np.divide(numerator(weights), divisors, out=np.full(len(divisors), np.nan), where=divisors != 0)

    return statistic


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Statistic:
    """Divide the weighted sum of N numerators by that of N denominators; NaN if the latter is 0."""
    return over(total(numerators), total(denominators))


def mean(values: ArrayLike) -> Statistic:
    """Return the weighted mean of N values. Those that are NaN are left out."""
    data = np.asarray(values, float)
    return ratio(np.nan_to_num(data), ~np.isnan(data))


def quantile(values: ArrayLike, q: float) -> Statistic:
    """Return the quantile 0 <= q <= 1 of N values, each repeated by its integer weight.

    Interpolates linearly between two order statistics: definition 7 of Hyndman and Fan 1996, as in numpy.
    """
    order = np.argsort(values)
    ordered = np.asarray(values, float)[order]

    def statistic(weights: Numbers) -> Numbers:
        ends = weights[:, order].cumsum(1)
        position = q * (ends[:, -1] - 1)
        low, high = (ordered[(ends <= rank[:, None]).sum(1)] for rank in (np.floor(position), np.ceil(position)))
        return low + (position % 1) * (high - low)

    return statistic


def bootstrap(
    statistics: Mapping[str, Statistic], clusters: Sequence[Hashable], seed: int
) -> dict[str, float | list[float]]:
    """Return metrics and their 95% intervals. All statistics share one set of resamples of clusters.

    The intervals are percentile intervals with levels widened for C clusters, Phi(-sqrt(C / (C - 1)) t) with t the
    97.5% quantile of Student's t with C - 1 degrees of freedom, because plain percentiles are too narrow for few
    clusters (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", expanded percentile interval). In
    simulations they cover the true value in 93% to 95% of cases with nine clusters, in 92% if a few of these
    contain most items, and in 88% with four. If all N items have one cluster, each is its own cluster.

    Returns:
        `name` and `name_ci`, [low, high], for each statistic. The interval leaves out resamples in which the
        statistic is NaN. A statistic that is NaN on the items themselves is left out. A metric that is the same
        in every resample, such as a share of 5 in 5, has an interval of width 0, which does not prove it exact.
    """
    codes = _codes(clusters)
    count = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    values = {name: float(statistic(np.ones((1, len(codes))))[0]) for name, statistic in statistics.items()}
    parts: dict[str, list[Numbers]] = {name: [] for name, value in values.items() if not np.isnan(value)}
    for rows in _chunks(RESAMPLES, len(codes)):
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        weights = times[:, codes].astype(float)
        for name, part in parts.items():
            part.append(statistics[name](weights))
    others = max(count - 1, 1)
    tail = ndtr(-np.sqrt(count / others) * stdtrit(others, 0.975))
    metrics: dict[str, float | list[float]] = {}
    for name, part in parts.items():
        interval = np.nanquantile(np.concatenate(part), [tail, 1 - tail]).tolist()
        metrics |= {name: values[name], f"{name}_ci": interval}
    return metrics


def paired_test(differences: Sequence[float], clusters: Sequence[Hashable], seed: int) -> float:
    """Return the two-sided p-value of the sign-flip permutation test on the sums of clusters.

    The null hypothesis: the difference of each cluster is symmetric around 0. p is exact, and at least 2 /
    2^clusters, for up to 13 clusters and for differences that are multiples of 1/4, as those of wins are. Other
    differences of more clusters are tested with 9999 random flips.

    The differences are of two policies on the same N items. If all have one cluster, each is its own cluster.
    """
    sums = np.bincount(_codes(clusters), weights=differences)
    sums = sums[sums != 0]  # flipping 0 has no effect
    threshold = np.abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # equal sums differ by rounding
    if 2 ** len(sums) <= FLIPS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float(np.mean(np.abs(signs @ sums) >= threshold))
    if np.array_equal(4 * sums, np.rint(4 * sums)):
        return _exact_p(np.rint(4 * sums).astype(np.int64))
    rng = np.random.default_rng(seed)
    extreme = 0
    for rows in _chunks(FLIPS, len(sums)):
        signs = 2.0 * rng.integers(2, size=(rows, len(sums)), dtype=np.int8) - 1
        extreme += int(np.count_nonzero(np.abs(signs @ sums) >= threshold))
    return (extreme + 1) / (FLIPS + 1)


def _exact_p(sums: NDArray[np.int64]) -> float:
    """Return p of the sign-flip test on C integer sums a, from the distribution of their flipped total.

    Its characteristic function is the product of cos(w a). The inverse Fourier transform on as many points as the
    total has values is exact, except for rounding of about 1e-16.
    """
    sizes, counts = np.unique(np.abs(sums), return_counts=True)
    points = 2 * int(sizes @ counts) + 1
    angles = 2 * np.pi * np.arange(points) / points
    transform = np.ones(points)
    for size, count in zip(sizes, counts, strict=True):
        transform *= np.cos(angles * size) ** count
    chances = np.fft.fft(transform).real / points  # of the totals 0, 1, ..., -2, -1
    reached = abs(int(sums.sum()))
    tail = float(chances[reached : points - reached + 1].sum()) if reached else 1.0
    return min(max(tail, 2.0 ** (1 - len(sums))), 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of one family of tests for multiple comparisons (Holm 1979)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)].tolist()


def _codes(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return the index of each item's cluster, or of the item itself if there is only one cluster."""
    codes, distinct = pd.factorize(pd.Series(list(clusters), dtype=object))
    return codes if len(distinct) > 1 else np.arange(len(codes))


def _chunks(rows: int, width: int) -> Iterator[int]:
    """Split a number of rows so that a chunk has at most `CHUNK_SIZE` values."""
    size = max(1, CHUNK_SIZE // width)
    return (min(size, rows - start) for start in range(0, rows, size))
