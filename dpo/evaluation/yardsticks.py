"""Upper bounds of the judged reward at a given KL, from scored responses of the reference alone.

No policy is trained for them. Best-of-n and the optimum choose by the judge that evaluates, so a policy trained on
human preferences is not expected to reach them: they show how much of the KL it spends on other changes.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import betaln, logsumexp
from scipy.stats import f_oneway

MIN_EFFECTIVE_SAMPLES = 20
MIN_RESPONSES = 32  # of a prompt
SIGNIFICANCE_LEVEL = 0.05
BEST_OF = (2, 4, 8, 16)
POINTS = 24  # of the optimum's curve


def groups(scores: ArrayLike, prompts: Sequence[Hashable]) -> list[np.ndarray]:
    """Split N scores into groups that estimate one reward distribution each.

    Every prompt is a group if each has at least 32 responses. Otherwise all responses form one group if the
    prompts' mean scores do not differ (one-way analysis of variance, p >= 0.05), which needs a prompt with
    several responses. If they differ, there is no group: best-of-n would choose the prompt, not the response.
    """
    table = pd.Series(np.asarray(scores, float)).groupby(list(prompts))
    each = [group.to_numpy() for _, group in table]
    if min(map(len, each)) >= MIN_RESPONSES:
        return each
    everything = np.concatenate(each)
    if len(everything) < MIN_RESPONSES or (len(each) > 1 and len(each) == len(everything)):
        return []
    if len(each) == 1 or np.ptp(everything) == 0:
        return [everything]
    differs = f_oneway(*each).pvalue < SIGNIFICANCE_LEVEL
    return [] if differs else [everything]


def best_of_n(scores: ArrayLike, n: int) -> tuple[float, float]:
    """Return an upper bound of the KL in nats, and the expected score, of the best of n responses.

    The expectation is exact for n of the N scores without replacement: the i-th smallest score is the maximum with
    probability C(i - 1, n - 1) / C(N, n). The bound is log n - (n - 1) / n (Beirami et al. 2024, "Theoretical
    Guarantees on the Best-of-n Alignment Policy", arXiv 2401.01879).
    """
    ordered = np.sort(np.asarray(scores, float))
    ranks = np.arange(n, len(ordered) + 1)
    probabilities = np.exp(_log_binomial(ranks - 1, n - 1) - _log_binomial(len(ordered), n))
    return math.log(n) - (n - 1) / n, float(probabilities @ ordered[n - 1 :])


def _log_binomial(n: ArrayLike, k: int) -> np.ndarray:
    n = np.asarray(n, float)
    return -betaln(n - k + 1, k + 1) - np.log1p(n)


def optimum(scores: ArrayLike, beta: float) -> tuple[float, float, float]:
    """Return KL in nats, expected score and effective sample size of pi_ref(y|x) exp(r(x, y) / beta) / Z(x).

    This policy is the KL-constrained optimum (Rafailov et al. 2023, eq. 4) for the judge's score as reward.
    Self-normalised importance sampling weights the N responses of the reference with w_i = exp(r_i / beta) /
    sum_j exp(r_j / beta): the score is sum w r, the KL sum w log(N w), the effective sample size 1 / sum w^2.
    """
    rewards = np.asarray(scores, float)
    log_weights = rewards / beta - logsumexp(rewards / beta)
    weights = np.exp(log_weights)
    kl = max(0.0, float(weights @ (log_weights + math.log(len(rewards)))))
    return kl, float(weights @ rewards), float(1 / (weights @ weights))


def yardsticks(scores: ArrayLike, prompts: Sequence[Hashable]) -> pd.DataFrame:
    """Return the points of best-of-n and of the optimum for the frontier.

    Scores and prompts belong to N responses of the reference. The means are over the groups of `groups`; the
    table is empty if there are none. Best-of-n needs 4 n responses in each group. The optimum is left out where
    the effective sample size of a group is below 20.

    Returns:
        One row per point: `yardstick`, `best-of-n` or `optimum`; `setting`, n or beta; `kl`, nats; `reward`.
    """
    parts = groups(scores, prompts) if np.size(scores) else []
    columns = ["yardstick", "setting", "kl", "reward"]
    spread = np.mean([part.std() for part in parts]) if parts else 0.0
    if spread == 0:
        return pd.DataFrame(columns=columns)
    rows = []
    for n in BEST_OF:
        if 4 * n <= min(map(len, parts)):
            kl, reward = np.mean([best_of_n(part, n) for part in parts], 0)
            rows.append(("best-of-n", n, kl, reward))
    for beta in spread * np.geomspace(10, 0.1, POINTS):
        points = [optimum(part, beta) for part in parts]
        if min(size for _, _, size in points) >= MIN_EFFECTIVE_SAMPLES:
            kl, reward, _ = np.mean(points, 0)
            rows.append(("optimum", beta, kl, reward))
    return pd.DataFrame(rows, columns=columns)


def kl_at(reward: float | None, curve: pd.DataFrame) -> float | None:
    """Return the KL at which the optimum has `reward`, interpolated; None without reward or beyond its curve."""
    points = curve[curve["yardstick"] == "optimum"].sort_values("reward")
    if reward is None or not len(points) or not points["reward"].iloc[0] <= reward <= points["reward"].iloc[-1]:
        return None
    return float(np.interp(reward, points["reward"], points["kl"]))
