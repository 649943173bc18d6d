"""pass@k against enumeration; the share of problems without a pair and of right work by hand."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from dpo.evaluation.response_metrics import response_metrics
from dpo.evaluation.verifier_metrics import pass_at_k


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_response(n):
    for right in range(n + 1):
        outcomes = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            expected = np.mean([any(drawn) for drawn in combinations(outcomes, k)])
            assert pass_at_k(np.array([float(n)]), np.array([float(right)]), k)[0] == pytest.approx(expected)
    assert np.isnan(pass_at_k(np.array([float(n)]), np.array([0.0]), n + 1)[0])


def verified(scores, work, suffix=""):
    """Responses to problems: `scores` has a list for each problem."""
    flat = [score for each in scores for score in each]
    count = len(flat)
    table = {
        "prompt": [f"p{number}" for number, each in enumerate(scores) for _ in each],
        "response": ["word"] * count,
        **{name: [[1, 2]] * count for name in ("ids", "reference_ids")},
        **{name: [True] * count for name in ("finished", "reference_finished")},
        **{name: [1.0] * count for name in ("kl", "entropy", "implicit_reward")},
        "win": [0.5] * count,
        f"win{suffix}": [0.5] * count,
        f"score{suffix}": flat,
        f"reference_score{suffix}": [0.0] * count,
        f"right_work{suffix}": work,
    }
    return pd.DataFrame(table)


@pytest.mark.parametrize("suffix", ["", "/verifier"])
def test_each_problem_counts_once(suffix):
    table = verified([[1, 0, 0, 0], [1, 1], [0]], [0, 0, 0, 0, 1, 1, 0], suffix)
    metrics = response_metrics(table, 0)
    assert metrics[f"pass_at_1{suffix}"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert metrics[f"pass_at_2{suffix}"] == pytest.approx((0.5 + 1) / 2)  # the third has one response
    assert f"pass_at_4{suffix}" not in metrics  # one of three problems has four responses
    assert metrics[f"reference_pass_at_2{suffix}"] == 0
    assert metrics[f"without_pair{suffix}"] == pytest.approx(1 / 2)
    assert metrics[f"right_work{suffix}"] == pytest.approx(2 / 7)
    assert metrics[f"right_answer_wrong_work{suffix}"] == pytest.approx(1 / 3)
    low, high = metrics[f"pass_at_1{suffix}_ci"]
    assert 0 <= low < metrics[f"pass_at_1{suffix}"] < high <= 1


def test_work_that_cannot_be_checked_has_no_metric():
    metrics = response_metrics(verified([[1, 0], [1, 1]], [np.nan] * 4), 0)
    assert metrics["pass_at_1"] == 0.75
    assert not {"right_work", "right_answer_wrong_work"} & set(metrics)
