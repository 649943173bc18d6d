"""Coverage of the intervals by simulation; statistics and p-values against numpy, scipy and enumeration."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from dpo.evaluation import bootstrap as module
from dpo.evaluation.bootstrap import bootstrap, holm, mean, over, paired_test, quantile, ratio, total

NINE = [5, 8, 10, 12, 14, 16, 18, 20, 25]
NINE_VERY_UNEQUAL = [39, 5, 5, 28, 2, 11, 30, 5, 3]
SIXTY = [1, 2, 3, 4, 5, 6] * 10


def weights_of_ones(count):
    return np.ones((1, count))


@pytest.mark.parametrize("q", [0, 0.05, 0.25, 0.5, 0.731, 0.95, 1])
def test_weighted_quantile_equals_numpy_on_repeated_values(q):
    rng = np.random.default_rng(0)
    values = rng.normal(size=40).round(1)  # with ties
    weights = rng.integers(0, 4, size=(25, 40)).astype(float)
    expected = [np.quantile(np.repeat(values, row.astype(int)), q) for row in weights]
    np.testing.assert_allclose(quantile(values, q)(weights), expected, rtol=1e-12)


def test_the_mean_leaves_out_nan():
    weights = np.array([[1.0, 1, 1], [2, 1, 0], [0, 0, 3]])
    np.testing.assert_array_equal(mean([1.0, 4.0, np.nan])(weights), [2.5, 2.0, np.nan])


def test_weighted_mean_and_ratio_equal_numpy_on_repeated_values():
    rng = np.random.default_rng(1)
    above, below = rng.normal(size=30), rng.integers(1, 9, size=30)
    weights = rng.integers(0, 4, size=(25, 30)).astype(float)
    repeated = [(np.repeat(above, row.astype(int)), np.repeat(below, row.astype(int))) for row in weights]
    np.testing.assert_allclose(mean(above)(weights), [a.mean() for a, _ in repeated], rtol=1e-12)
    np.testing.assert_allclose(ratio(above, below)(weights), [a.sum() / b.sum() for a, b in repeated], rtol=1e-12)
    doubled = over(ratio(above, below), total(below))(weights)
    np.testing.assert_allclose(doubled, [a.sum() / b.sum() ** 2 for a, b in repeated], rtol=1e-12)


def test_ratio_with_denominator_zero_is_nan():
    assert np.isnan(ratio([1.0, 2.0], [0, 0])(weights_of_ones(2))).all()


def simulated(kind, sizes, rng):
    """Return a statistic of normal items with intra-cluster correlation 0.2, and its true value."""
    codes = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.normal(size=len(sizes))[codes] * 0.2**0.5 + rng.normal(size=len(codes)) * 0.8**0.5
    if kind == "mean":
        return mean(values + 3), 3
    if kind == "wins":
        return mean(values > stats.norm.ppf(0.3)), 0.7
    if kind == "ratio":
        tokens = rng.integers(1, 30, size=len(codes))
        return ratio(tokens * (values + 2), tokens), 2
    return quantile(values, 0.25), stats.norm.ppf(0.25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "wins", "ratio", "quantile"])
@pytest.mark.parametrize(
    ("sizes", "resamples", "least"),
    [(NINE, 2000, 0.92), (NINE_VERY_UNEQUAL, 2000, 0.90), (SIXTY, 500, 0.92), ([1] * 60, 500, 0.92)],
    ids=["nine", "very unequal", "sixty", "single"],
)
def test_intervals_cover_the_true_value_in_95_percent_of_data_sets(kind, sizes, resamples, least, monkeypatch):
    monkeypatch.setattr(module, "RESAMPLES", resamples)
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    covered = []
    for seed in range(500):
        statistic, truth = simulated(kind, sizes, rng)
        low, high = bootstrap({"figure": statistic}, clusters, seed)["figure_ci"]
        covered.append(low <= truth <= high)
    assert least <= np.mean(covered) <= 0.98


def test_intervals_equal_scipy_if_every_item_is_a_cluster():
    values = np.random.default_rng(2).exponential(size=400)
    ours = bootstrap({"mean": mean(values)}, range(400), 0)["mean_ci"]
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0), n_resamples=20_000
    )
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.05 * width)


def test_levels_are_widened_for_few_clusters(monkeypatch):
    # Nine clusters: the widened tails are Phi(-sqrt(9/8) * 2.306) = 0.72%, not 2.5%.
    values = np.random.default_rng(11).normal(size=9)
    rng = np.random.default_rng(12)
    means = rng.choice(values, size=(200_000, 9)).mean(1)
    monkeypatch.setattr(module, "RESAMPLES", 50_000)
    found = bootstrap({"mean": mean(values)}, range(9), 0)["mean_ci"]
    assert found == pytest.approx(np.quantile(means, [0.0072, 0.9928]), abs=0.02)
    assert found != pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1)


def test_three_clusters_give_the_full_range():
    # Three clusters of means 0, 1 and 5: the 27 resamples have means (i + j + k) / 3. t of 2 degrees of freedom is
    # 4.303, so the tails are Phi(-sqrt(3/2) * 4.303) = 7e-8, and the interval is from minimum to maximum.
    assert bootstrap({"mean": mean([0, 0, 1, 1, 5, 5])}, [*"aabbcc"], 0)["mean_ci"] == pytest.approx(
        [0, 5], abs=1e-3
    )


def test_clusters_are_resampled():
    values = np.repeat(np.random.default_rng(3).normal(size=50), 20)
    codes = np.repeat(np.arange(50), 20)
    low, high = bootstrap({"mean": mean(values)}, codes.tolist(), 0)["mean_ci"]
    single = bootstrap({"mean": mean(values)}, range(1000), 0)["mean_ci"]
    assert (high - low) / (single[1] - single[0]) == pytest.approx(20**0.5, rel=0.1)


def test_items_are_resampled_if_there_is_one_cluster():
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap({"m": mean(values)}, ["prompt"] * 30, 0) == bootstrap({"m": mean(values)}, range(30), 0)


def test_statistics_share_their_resamples():
    values = np.random.default_rng(5).normal(size=30)
    found = bootstrap({"plus": mean(values), "minus": mean(-values)}, range(30), 0)
    assert found["plus_ci"] == pytest.approx([-end for end in reversed(found["minus_ci"])])


def test_result_depends_only_on_data_and_seed(monkeypatch):
    values = np.random.default_rng(6).normal(size=30)
    found = bootstrap({"m": mean(values)}, range(30), 1)
    assert found == bootstrap({"m": mean(values)}, range(30), 1)
    assert found != bootstrap({"m": mean(values)}, range(30), 2)
    monkeypatch.setattr(module, "CHUNK_SIZE", 30 * 7)  # 2000 resamples in chunks of 7
    assert found["m_ci"] == pytest.approx(bootstrap({"m": mean(values)}, range(30), 1)["m_ci"], rel=1e-12)


def test_memory_is_bounded_by_the_chunk_size():
    largest = 0

    def statistic(weights):
        nonlocal largest
        largest = max(largest, weights.size)
        return weights[:, 0]

    bootstrap({"first": statistic}, range(20_000), 0)
    assert largest <= module.CHUNK_SIZE


def test_nan_resamples_and_nan_statistics_are_left_out():
    found = bootstrap({"ratio": ratio([1, 2, 3], [0, 0, 3]), "nothing": ratio([1, 2, 3], [0, 0, 0])}, range(3), 0)
    assert set(found) == {"ratio", "ratio_ci"}
    assert found["ratio"] == 2
    assert np.isfinite(found["ratio_ci"]).all()


def test_interval_of_one_item_or_equal_items_has_width_zero():
    assert bootstrap({"m": mean([2.0])}, ["a"], 0) == {"m": 2.0, "m_ci": [2.0, 2.0]}
    assert bootstrap({"m": mean([1, 1, 1])}, [*"aab"], 0) == {"m": 1.0, "m_ci": [1.0, 1.0]}


def test_metrics_are_json():
    found = bootstrap({"m": mean([1, 0, 1]), "q": quantile([1, 2, 3], 0.5)}, [*"aab"], 0)
    assert json.loads(json.dumps(found)) == found


def enumerated(sums):
    """Return the share of all flips whose sum is at least as far from 0 as the observed one."""
    every = itertools.product((1, -1), repeat=len(sums))
    flipped = [abs(sum(sign * x for sign, x in zip(signs, sums, strict=True))) for signs in every]
    return np.mean([value >= abs(sum(sums)) - 1e-9 for value in flipped])


def test_p_value_by_hand():
    # Of the 8 flips of (1, 2, 4) only +++ and --- reach |7|; of (1, 2, -4) sums of at least |-1| are all 8.
    assert paired_test([1, 2, 4], [*"abc"], 0) == 2 / 8
    assert paired_test([1, 2, -4], [*"abc"], 0) == 1
    assert paired_test([0.5, 0.5, 1, 1, 4], [*"aabbc"], 0) == 2 / 8  # sums of clusters
    assert paired_test([1, 2, 4], [*"aaa"], 0) == 2 / 8  # one cluster: items are flipped
    assert paired_test([1, 2, 4] + [0] * 50, range(53), 0) == 2 / 8  # flipping ties has no effect
    # With +0.4 the sums are 1, 0.4, 0.6, 0, 0.8, 0.2, 0.4 and -0.2: five of the eight reach the observed 0.4.
    assert paired_test([0.1, 0.2, -0.3, 0.4], range(4), 0) == 5 / 8
    assert paired_test([-0.1, -0.2, 0.3, 0.4], range(4), 0) == 5 / 8


def test_few_clusters_are_tested_with_all_flips():
    rng = np.random.default_rng(8)
    for count in (2, 5, 11):
        sums = rng.normal(size=count).round(1) + 0.3
        assert paired_test(sums.tolist(), range(count), 0) == pytest.approx(enumerated(sums), abs=1e-12)


@pytest.mark.parametrize("ties", [0, 40])
def test_p_value_of_many_clusters_equals_scipy(ties, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_SIZE", 10_000)
    differences = np.append(np.random.default_rng(9).normal(0.35, 1, size=60), np.zeros(ties))
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", rng=np.random.default_rng(1), n_resamples=20_000
    ).pvalue
    assert 0.01 < expected < 0.2
    assert paired_test(differences.tolist(), range(60 + ties), 0) == pytest.approx(expected, abs=0.01)


def test_p_value_of_no_difference_is_1():
    assert paired_test([0.0] * 30, range(30), 0) == 1
    assert paired_test([0.1, 0.2, -0.3], [*"aab"], 0) == 1


def test_p_value_of_many_clusters_is_never_0():
    assert 0 < paired_test([1.0] * 100, range(100), 0) < 1e-12
    assert paired_test([math.pi] * 100, range(100), 0) == 1 / 10_000


@pytest.mark.parametrize(("wins", "losses"), [(14, 0), (40, 24), (300, 212), (256, 256)])
def test_p_value_of_wins_is_that_of_the_exact_sign_test(wins, losses):
    differences = [0.5] * wins + [-0.5] * losses + [0.0] * 10
    expected = stats.binomtest(wins, wins + losses).pvalue
    assert paired_test(differences, range(len(differences)), 0) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_p_value_of_sums_of_several_responses_equals_the_convolution_of_all_flips():
    sums = np.random.default_rng(11).integers(-6, 9, size=30) / 4
    chances = {0: 1.0}
    for value in (4 * sums).astype(int):
        flipped = {}
        for total_so_far, chance in chances.items():
            for sign in (-1, 1):
                key = total_so_far + sign * value
                flipped[key] = flipped.get(key, 0) + chance / 2
        chances = flipped
    expected = sum(chance for value, chance in chances.items() if abs(value) >= abs(4 * sums.sum()))
    assert paired_test(sums.tolist(), range(30), 0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("clusters", [10, 40])
def test_true_null_hypotheses_are_rejected_in_5_percent_of_tests(clusters, monkeypatch):
    monkeypatch.setattr(module, "FLIPS", 1500)
    rng = np.random.default_rng(10)
    codes = np.repeat(np.arange(clusters), 3)
    p = [
        paired_test(rng.normal(size=clusters)[codes] + rng.normal(size=len(codes)), codes.tolist(), seed)
        for seed in range(1000)
    ]
    assert 0.035 <= np.mean(np.array(p) <= 0.05) <= 0.065


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.4 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.4, and each is at least the one before.
    assert holm([0.03, 0.4, 0.01, 0.02]) == pytest.approx([0.06, 0.4, 0.04, 0.06])
    assert holm([0.02, 0.021, 0.022]) == pytest.approx([0.06, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []
