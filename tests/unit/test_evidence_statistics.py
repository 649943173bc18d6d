"""Statistics of the evidence against closed forms, brute force and scipy."""

import numpy as np
import pytest
from scipy.stats import permutation_test

from benchmarks.evidence.statistics import (
    curve,
    interval,
    over_prompts,
    over_seeds,
    permutation_p,
    reward_at,
    two_level,
    weighted_mean,
)


def result(kl, score, reference=0.0, responses=(2.0, 2.0)):
    """A result whose prompts have equal means."""
    count = np.array(responses)
    prompts = {"responses": count, "kl_responses": count, "kl": kl * count, "score/judge": score * count}
    return {"prompts": {**prompts, "reference_score/judge": reference * count}}


def test_means_weight_every_response():
    prompts = {"responses": [3, 1], "kl_responses": [1, 1], "kl": [2.0, 4.0], "score/judge": [3.0, 0.0]}
    weights = [[1, 1], [0, 2]]
    np.testing.assert_allclose(weighted_mean({"prompts": prompts}, "score/judge", weights), [0.75, 0.0])
    np.testing.assert_allclose(weighted_mean({"prompts": prompts}, "kl", weights), [3.0, 4.0])


def test_a_curve_starts_at_the_reference():
    kl, reward = curve([result(1.0, 0.4, 0.1), result(4.0, 0.8, 0.1)], "judge", np.ones((1, 2)))
    np.testing.assert_allclose(kl[:, 0], [0, 1, 4])
    np.testing.assert_allclose(reward[:, 0], [0.1, 0.4, 0.8])


def test_the_reward_is_interpolated_in_the_square_root_of_kl():
    """On reward = a sqrt(KL) + b the interpolation is exact."""
    kl = np.array([[0.0], [9.0], [1.0], [4.0]])
    reward = 0.3 * np.sqrt(kl) + 0.1
    for target in (0.0, 0.25, 2.0, 6.25, 9.0):
        assert reward_at(kl, reward, target) == pytest.approx(0.3 * np.sqrt(target) + 0.1)


def test_nothing_is_extrapolated():
    kl, reward = np.array([[0.0, 0.0], [1.0, 3.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
    at = reward_at(kl, reward, 2.0)
    assert np.isnan(at[0])
    assert at[1] == pytest.approx(np.sqrt(2 / 3))
    assert np.isnan(reward_at(kl[:1] + 1, reward[:1], 0.5)).all()  # below the first point


def test_the_variance_of_the_bootstrap_is_that_of_seeds_and_of_prompts_within_seeds():
    """Of S seeds with P prompts each: Var = between / S + mean(within) / (S P), with population variances."""
    draw = np.random.default_rng(1)
    values = {seed: draw.normal(seed, 2.0, 12) for seed in range(4)}
    resampled = two_level(
        lambda seed, weights: weights @ values[seed] / 12, dict.fromkeys(values, 12), resamples=40_000
    )
    between = np.var([each.mean() for each in values.values()])
    within = np.mean([each.var() / 12 for each in values.values()])
    assert resampled.var() == pytest.approx((between + within) / 4, rel=0.03)
    assert resampled.mean() == pytest.approx(np.mean([each.mean() for each in values.values()]), abs=0.03)


def test_undefined_values_of_a_seed_are_left_out_of_the_mean():
    resampled = two_level(lambda seed, w: np.full(len(w), np.nan if seed else 5.0), {0: 3, 1: 3}, resamples=64)
    assert set(resampled[~np.isnan(resampled)]) == {5.0}
    assert np.isnan(resampled).any()  # both draws were the other seed


def test_fewer_than_three_seeds_have_no_interval_over_seeds():
    def statistic(seed, weights):
        return np.full(len(weights), float(seed))

    assert over_seeds(statistic, {0: 3, 1: 3}) is None
    assert over_seeds(statistic, {0: 3, 1: 3, 2: 3}) == (0.0, 2.0)
    assert over_prompts(statistic, {0: 3, 1: 3}) == (0.5, 0.5)  # seeds are not drawn


def test_the_interval_over_prompts_is_that_of_the_t_distribution():
    """The mean of two seeds with P prompts each: Var = mean(within) / 2, with population variances."""
    values = np.random.default_rng(1).normal(0, 1, (2, 200))
    low, high = over_prompts(lambda seed, weights: weights @ values[seed] / 200, {0: 200, 1: 200})
    half = 1.96 * np.sqrt(values.var(1).mean() / 200 / 2)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_the_levels_of_an_interval_are_wider_for_few_units():
    values = np.linspace(0, 1, 1001)
    assert interval(values, 5) == pytest.approx((0.001, 0.999), abs=1e-3)
    assert interval(values, 10_000) == pytest.approx((0.025, 0.975), abs=1e-3)
    assert interval(values, 1) is None
    assert interval(np.full(9, np.nan), 5) is None


@pytest.mark.parametrize("size", [3, 5])
def test_the_permutation_test_equals_that_of_scipy(size):
    first, second = np.random.default_rng(size).normal(0, 1, (2, size))
    expected = permutation_test(
        (first, second), lambda a, b: abs(np.mean(a) - np.mean(b)), alternative="greater", n_resamples=np.inf
    )
    assert permutation_p(first, second) == pytest.approx(expected.pvalue)


def test_the_least_p_value_is_two_of_all_assignments():
    assert permutation_p([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) == pytest.approx(2 / 252)
    assert permutation_p([0.3, 0.3], [0.3, 0.3]) == 1
