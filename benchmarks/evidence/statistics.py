"""Statistics of the evidence: reward at equal KL, two-level bootstrap, permutation of whole runs.

A claim about methods has the seed as its unit, because a seed draws everything again. Prompts are a sample, too.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

Numbers = NDArray[np.float64]
Result = Mapping[str, Any]
"""A result file of a case that did not fail."""
Statistic = Callable[[int, Numbers], Numbers]
Bounds = tuple[float, float]
RESAMPLES = 2000
MIN_SEEDS = 3
"""Seeds below which no interval is given: two cannot tell how much seeds differ."""


def weighted_mean(result: Result, name: str, weights: ArrayLike) -> Numbers:
    """Return the mean per response of `kl` or of a score, for weights [B, P] of the P prompts."""
    prompts = result["prompts"]
    counts = prompts["kl_responses" if name == "kl" else "responses"]
    return np.asarray(weights, float) @ np.asarray(prompts[name], float) / (np.asarray(weights, float) @ counts)


def curve(runs: Sequence[Result], judge: str, weights: ArrayLike) -> tuple[Numbers, Numbers]:
    """Return KL and reward [points, B] of the policies of one method and seed, for weights [B, P] of the prompts.

    The first point is the reference, whose KL is 0.
    """
    rewards = [weighted_mean(runs[0], f"reference_score/{judge}", weights)]
    rewards += [weighted_mean(run, f"score/{judge}", weights) for run in runs]
    kls = [np.zeros(len(rewards[0])), *(weighted_mean(run, "kl", weights) for run in runs)]
    return np.array(kls), np.array(rewards)


def reward_at(kl: Numbers, reward: Numbers, target: float) -> Numbers:
    """Return the reward [B] at a KL from curves [points, B], interpolated linearly in sqrt(KL) (Gao et al. 2022).

    It is NaN if the curve does not reach that KL: nothing is extrapolated.
    """
    order = np.argsort(kl, axis=0)
    x, y = (np.take_along_axis(values, order, 0) for values in (np.sqrt(np.maximum(kl, 0)), reward))
    at = np.sqrt(target)
    columns = (np.interp(at, x[:, b], y[:, b]) for b in range(x.shape[1]))
    return np.where((x[0] <= at) & (at <= x[-1]), np.fromiter(columns, float, x.shape[1]), np.nan)


def over_seeds(statistic: Statistic, prompts: Mapping[int, int]) -> Bounds | None:
    """Return the interval of `two_level`. None for fewer than three seeds, or if no resample has a value."""
    return interval(two_level(statistic, prompts), len(prompts)) if len(prompts) >= MIN_SEEDS else None


def over_prompts(statistic: Statistic, prompts: Mapping[int, int]) -> Bounds | None:
    """Return an interval for these seeds, in which only prompts are drawn. It says nothing about other seeds."""
    drawn = np.tile(np.arange(len(prompts)), (RESAMPLES, 1))
    return interval(_resampled_means(statistic, prompts, drawn, np.random.default_rng(0)), min(prompts.values()))


def seeds_or_prompts(statistic: Statistic, prompts: Mapping[int, int]) -> Bounds | None:
    """Return the interval over seeds, or that over prompts for fewer than three seeds."""
    return over_seeds(statistic, prompts) or over_prompts(statistic, prompts)


def two_level(statistic: Statistic, prompts: Mapping[int, int], *, resamples: int = RESAMPLES) -> Numbers:
    """Return resampled means over seeds [resamples]: seeds are drawn with replacement, then prompts within each.

    Args:
        statistic: maps a seed and weights [B, P] of its P prompts to B values. NaN is left out of the mean.
        prompts: P of each seed.
        resamples: number of resamples.
    """
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(prompts), size=(resamples, len(prompts)))
    return _resampled_means(statistic, prompts, drawn, rng)


def _resampled_means(
    statistic: Statistic, prompts: Mapping[int, int], drawn: NDArray[np.int64], rng: np.random.Generator
) -> Numbers:
    values = np.full(drawn.shape, np.nan)
    for place, (seed, count) in enumerate(prompts.items()):
        rows, slots = np.nonzero(drawn == place)
        weights = rng.multinomial(count, np.full(count, 1 / count), len(rows)).astype(float)
        values[rows, slots] = statistic(seed, weights)
    known = ~np.isnan(values)
    return np.divide(np.nansum(values, 1), known.sum(1), out=np.full(len(drawn), np.nan), where=known.any(1))


def interval(resampled: Numbers, units: int) -> Bounds | None:
    """Return the 95% percentile interval, with levels widened for few units as in `dpo.evaluation.bootstrap`.

    None for one unit, or if no resample has a value.
    """
    if units < 2 or np.isnan(resampled).all():
        return None
    tail = ndtr(-np.sqrt(units / (units - 1)) * stdtrit(units - 1, 0.975))
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def permutation_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the exact two-sided p-value of the difference of means under all assignments of runs to two methods.

    Runs of the same seed share data and reference, which makes the test conservative: their positive correlation
    narrows the difference, but not its distribution under reassignment. The least p is 2 / C(2 n, n): 2 / 252 for
    five runs against five, 0.1 for three against three.
    """
    values, size = np.array([*first, *second], float), len(first)
    total, observed = values.sum(), abs(np.mean(first) - np.mean(second))
    sums = np.array([values[list(places)].sum() for places in itertools.combinations(range(len(values)), size)])
    differences = np.abs(sums / size - (total - sums) / (len(values) - size))
    return float(np.mean(differences >= observed - 1e-12 * max(1.0, np.abs(values).max())))
