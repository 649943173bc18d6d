"""Best-of-n and the optimum against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from dpo.evaluation.yardsticks import best_of_n, groups, kl_at, optimum, yardsticks


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores = [0.3, -1.0, 2.0, 0.3, 0.9, 0.0]
    expected = np.mean([max(subset) for subset in itertools.combinations(scores, n)])
    kl, reward = best_of_n(scores, n)
    assert reward == pytest.approx(expected)
    assert kl == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_is_stable_for_many_responses():
    scores = np.random.default_rng(0).normal(size=100_000)
    assert best_of_n(scores, 1)[1] == pytest.approx(scores.mean())
    assert best_of_n(scores, 2)[1] == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)  # of a standard normal


def test_the_optimum_of_a_normal_reward_has_its_closed_form():
    """A reward N(0, 1) is tilted to N(1 / beta, 1) with KL 1 / (2 beta^2)."""
    scores = np.random.default_rng(1).normal(size=400_000)
    for beta in (1.0, 2.0, 4.0):
        kl, reward, size = optimum(scores, beta)
        assert reward == pytest.approx(1 / beta, abs=0.02)
        assert kl == pytest.approx(0.5 / beta**2, abs=0.02)
        assert size / len(scores) == pytest.approx(math.exp(-1 / beta**2), abs=0.05)


def test_the_kl_of_the_optimum_follows_from_its_normaliser():
    scores = np.array([0.1, 0.5, -0.2, 0.9])
    kl, reward, _ = optimum(scores, 0.3)
    assert kl == pytest.approx(reward / 0.3 - math.log(np.exp(scores / 0.3).mean()))


def test_no_policy_over_the_same_responses_has_more_reward_at_the_kl_of_the_optimum():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=6)
    kl, reward, _ = optimum(scores, 0.7)
    for weights in rng.dirichlet(np.ones(6), 2000):
        if weights @ np.log(6 * weights) <= kl:
            assert weights @ scores <= reward + 1e-9


def test_prompts_with_few_responses_are_pooled_only_if_their_scores_agree():
    rng = np.random.default_rng(3)
    prompts = [f"prompt {i // 4}" for i in range(96)]
    noise = rng.normal(size=96)
    assert [len(part) for part in groups(noise, prompts)] == [96]
    assert groups(noise + 5 * (np.arange(96) // 4), prompts) == []
    assert groups(noise, [str(i) for i in range(96)]) == []
    assert [len(part) for part in groups(noise[:64], ["a"] * 32 + ["b"] * 32)] == [32, 32]


def test_points_need_enough_effective_samples():
    scores = np.random.default_rng(4).normal(size=96)
    table = yardsticks(scores, ["prompt"] * 96)
    assert table[table["yardstick"] == "best-of-n"]["setting"].tolist() == [2, 4, 8, 16]
    curve = table[table["yardstick"] == "optimum"]
    assert curve["kl"].is_monotonic_increasing
    assert all(optimum(scores, beta)[2] >= 20 for beta in curve["setting"])
    assert optimum(scores, curve["setting"].min() * 0.8)[2] < 20
    assert yardsticks([1.0] * 96, ["prompt"] * 96).empty


def test_the_kl_at_a_reward_is_read_from_the_curve():
    scores = np.random.default_rng(5).normal(size=1000)
    table = yardsticks(scores, ["prompt"] * 1000)
    kl, reward, _ = optimum(scores, 1.3)
    assert kl_at(reward, table) == pytest.approx(kl, rel=0.02)
    assert kl_at(10.0, table) is None
