"""Metrics of verified responses: several responses to each problem, each of them right or wrong."""

import numpy as np
import pandas as pd
from scipy.special import comb

from dpo.evaluation.bootstrap import Numbers, Statistic, mean, ratio

COUNTS = (1, 2, 4, 8)
"""Values of k for pass@k."""


def pass_at_k(responses: Numbers, right: Numbers, k: int) -> Numbers:
    """Return the probability that at least one of k responses is right, 1 - C(n - c, k) / C(n, k).

    This is the unbiased estimate from n >= k responses to a problem, of which c are right (Chen et al. 2021,
    "Evaluating Large Language Models Trained on Code", section 2.1). It is NaN for fewer than k responses.
    """
    drawn = comb(responses, k)
    return np.where(drawn > 0, 1 - comb(responses - right, k) / np.maximum(drawn, 1), np.nan)


def verifier_statistics(table: pd.DataFrame, suffix: str = "") -> dict[str, Statistic]:
    """Return the statistics of responses that a verifier has scored. Each problem counts once.

    - `pass_at_K` for each K of `COUNTS` that at least half of the problems have as many responses to, over these
      problems, and `reference_pass_at_K` of the reference.
    - `without_pair`: share of the problems with at least two responses for which all are right or all are wrong,
      so that they make no preference pair.
    - `right_work`: share of responses of which every line of work is correct and leads to the answer.
      `right_answer_wrong_work`: share of right answers for which this does not hold.

    The columns `score`, `reference_score` and `right_work` end in `suffix`, and so do the names.
    """
    problems = table["prompt"]
    right, work = table[f"score{suffix}"] == 1, table[f"right_work{suffix}"]
    n = problems.groupby(problems).transform("size").to_numpy(float)
    sizes = problems.value_counts()
    sides = {"": right, "reference_": table[f"reference_score{suffix}"] == 1}
    counts = {side: each.groupby(problems).transform("sum").to_numpy(float) for side, each in sides.items()}
    statistics = {
        f"{side}pass_at_{k}": _per_problem(pass_at_k(n, count, k), n)
        for side, count in counts.items()
        for k in COUNTS
        if (sizes >= k).mean() >= 0.5
    }
    same = (counts[""] == 0) | (counts[""] == n)
    statistics["without_pair"] = _per_problem(np.where(n >= 2, same, np.nan), n)
    statistics["right_work"] = mean(work)
    checked = right & work.notna()
    statistics["right_answer_wrong_work"] = ratio(checked & (work == 0), checked)
    return {f"{name}{suffix}": statistic for name, statistic in statistics.items()}


def _per_problem(values: Numbers, responses: Numbers) -> Statistic:
    """Return the mean over problems of a value that all n responses to a problem have. NaN values are left out."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0) / responses, known / responses)
