"""Metrics of responses by hand; the length-controlled win rate against scipy's optimiser and simulated judges."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from dpo.evaluation.response_metrics import RIDGE, length_controlled, response_metrics, win_slices

END = 0


def samples(ids, reference_ids, **columns):
    """Return a table of responses. A response with the end token is finished."""
    count = len(ids)
    return pd.DataFrame(
        {
            "prompt": [f"p{number}" for number in range(count)],
            "response": ["word"] * count,
            "ids": ids,
            "reference_ids": reference_ids,
            "finished": [row[-1] == END for row in ids],
            "reference_finished": [row[-1] == END for row in reference_ids],
            "kl": [1.0] * count,
            "entropy": [2.0] * count,
            "implicit_reward": [0.5] * count,
            **columns,
        }
    )


def test_kl_entropy_and_lengths_by_hand():
    table = samples(
        [[5, 6, END], [5, 6, 7, 8, 9]],
        [[5, END], [5, END]],
        kl=[0.5, 3.5],
        entropy=[6.0, 10.0],
        implicit_reward=[1.0, -0.25],
    )
    metrics = response_metrics(table, 0)
    assert metrics["samples"] == 2
    assert metrics["kl"] == 2
    assert metrics["kl_per_token"] == 4 / 8
    assert metrics["entropy_per_token"] == 16 / 8
    assert metrics["tokens"] == 4
    assert metrics["length_ratio"] == 8 / 4
    assert metrics["implicit_reward"] == 0.375
    assert metrics["unfinished"] == 0.5
    assert metrics["reference_unfinished"] == 0
    assert metrics["unfinished_rise"] == 0.5
    assert metrics["unchanged"] == 0


def test_kl_entropy_and_implicit_reward_are_over_the_scored_responses():
    table = samples(
        [[5, END], [5, 6, 7, END], [5, 6, 7, 8, 9, END]],
        [[5, END]] * 3,
        kl=[0.5, 3.5, np.nan],
        entropy=[6.0, 10.0, np.nan],
        implicit_reward=[1.0, -0.25, np.nan],
    )
    metrics, alone = response_metrics(table, 0), response_metrics(table.head(2), 0)
    assert (metrics["samples"], metrics["kl_samples"]) == (3, 2)
    for name in ("kl", "kl_per_token", "entropy_per_token", "implicit_reward"):
        assert metrics[name] == alone[name]
        low, high = metrics[f"{name}_ci"]
        assert low <= metrics[name] <= high
    assert metrics["tokens"] == 4, "other metrics are over all responses"


def test_unchanged_counts_responses_that_equal_the_references():
    table = samples([[1, END], [1, 2], [3, END], [4]], [[1, END], [1, 2, END], [3, END], [5]])
    assert response_metrics(table, 0)["unchanged"] == 2 / 4


def test_repetition_by_hand():
    # 1 2 1 2 1 2 1 2 has the 4-grams 1212 2121 1212 2121 1212: 3 of 5 occur earlier. The end token is left out.
    repeating, plain, short = [1, 2] * 4 + [END], [1, 2, 3, 4, 5, END], [1, 1, 1, END]
    metrics = response_metrics(samples([repeating, short], [plain, [7] * 5 + [END]]), 0)
    assert metrics["repetition"] == pytest.approx(3 / 5 / 2)
    assert metrics["reference_repetition"] == pytest.approx(1 / 2 / 2)  # 7777 twice
    assert metrics["repetition_rise"] == pytest.approx(0.3 - 0.25)


def test_distinct_by_hand():
    # Tokens 1 2 3, 1 2 4: 4 of 6 distinct. 2-grams 12 23, 12 24: 3 of 4 distinct. The reference's are 12 and 56.
    metrics = response_metrics(samples([[1, 2, 3, END], [1, 2, 4]], [[1, 2], [5, 6, END]]), 0)
    assert metrics["distinct_1"] == pytest.approx(4 / 6)
    assert metrics["distinct_2"] == pytest.approx(3 / 4)
    assert metrics["reference_distinct_2"] == 1
    assert metrics["distinct_2_ratio"] == pytest.approx(3 / 4)


def test_distinct_equals_the_size_of_a_set():
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 12, size=rng.integers(1, 20)).tolist() for _ in range(60)]
    grams = [pair for row in ids for pair in itertools.pairwise(row)]
    metrics = response_metrics(samples(ids, [[1, 2]] * 60), 0)
    assert metrics["distinct_2"] == pytest.approx(len(set(grams)) / len(grams))
    tokens = [token for row in ids for token in row]
    assert metrics["distinct_1"] == pytest.approx(len(set(tokens)) / len(tokens))


def test_empty_responses_have_no_diversity():
    metrics = response_metrics(samples([[END]] * 3, [[1, 2, END]] * 3, response=["", " \n", "\u200b"]), 0)
    assert metrics["empty"] == 1
    assert metrics["distinct_1"] == metrics["distinct_2"] == metrics["distinct_2_ratio"] == 0
    assert metrics["repetition"] == 0
    empty_reference = response_metrics(samples([[1, 2, END]] * 3, [[END]] * 3), 0)
    assert empty_reference["empty"] == 0
    assert not empty_reference.keys() & {"distinct_2_ratio", "distinct_2_ratio_ci"}


def test_wins_and_scores_by_hand():
    table = samples(
        [[1, 2, END]] * 4,
        [[1, 2, END]] * 4,
        score=[0.9, 0.1, 0.3, 0.5],
        reference_score=[0.1, 0.9, 0.3, 0.2],
        win=[1, 0, 0.5, 1],
    )
    metrics = response_metrics(table, 0)
    assert metrics["win_rate"] == 2.5 / 4
    assert metrics["tie_rate"] == 1 / 4
    assert metrics["reward"] == pytest.approx(0.45)
    assert metrics["reference_reward"] == pytest.approx(0.375)
    assert metrics["judged_gain"] == pytest.approx(0.075)
    compared = response_metrics(table.drop(columns=["score", "reference_score"]), 0)
    assert compared["judged_gain"] == 0.125
    assert "reward" not in compared
    unjudged = response_metrics(samples([[1, END]], [[1, END]]), 0)
    assert not unjudged.keys() & {"win_rate", "tie_rate", "length_controlled_win_rate", "judged_gain", "reward"}


def test_every_metric_has_an_interval_and_is_json():
    table = samples([[1, 2, END], [3]] * 5, [[1, END], [2, 3]] * 5, win=[1, 0.5] * 5, score=1, reference_score=0)
    metrics = response_metrics(table, 0)
    names = {name for name in metrics if not name.endswith("_ci")} - {"samples", "kl_samples", "failed_verdicts"}
    assert {f"{name}_ci" for name in names} == {name for name in metrics if name.endswith("_ci")}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_failed_verdicts_are_counted_and_left_out():
    judged = response_metrics(samples([[1, 2, END], [3]] * 5, [[1, END]] * 10, win=[1, 0.5] * 5), 0)
    with_failed = samples([[1, 2, END], [3]] * 6, [[1, END]] * 12, win=[1, 0.5] * 5 + [np.nan] * 2)
    metrics = response_metrics(with_failed, 0)
    assert (judged["failed_verdicts"], metrics["failed_verdicts"]) == (0, 2)
    for name in ("win_rate", "tie_rate", "judged_gain"):
        assert metrics[name] == judged[name], name
    assert metrics["length_controlled_win_rate"] == pytest.approx(judged["length_controlled_win_rate"], abs=0.02)


def test_further_judges_add_only_their_win_rate_their_failed_verdicts_and_their_agreement():
    table = samples([[1, 2, END]] * 4, [[1, END]] * 4, win=[1, 1, 0, 0])
    alone = response_metrics(table, 0)
    metrics = response_metrics(table.assign(**{"win/rm": [1, 0.5, np.nan, 1], "score/rm": 3.0}), 0)
    added = metrics.keys() - alone.keys()
    expected = {"win_rate/rm", "win_rate/rm_ci", "failed_verdicts/rm", "same_verdict/rm", "same_verdict/rm_ci"}
    assert added == expected
    assert metrics["win_rate/rm"] == pytest.approx(2.5 / 3)
    assert metrics["failed_verdicts/rm"] == 1
    assert {name: metrics[name] for name in alone} == alone


def test_prompts_are_the_clusters():
    kl = np.repeat(np.random.default_rng(1).normal(size=40), 10)
    table = samples([[1, END]] * 400, [[1, END]] * 400, kl=kl)
    clustered = table.assign(prompt=np.repeat([f"p{number}" for number in range(40)], 10))
    single_low, single_high = response_metrics(table, 0)["kl_ci"]
    low, high = response_metrics(clustered, 0)["kl_ci"]
    assert (high - low) / (single_high - single_low) == pytest.approx(10**0.5, rel=0.15)


def test_ids_may_be_arrays_as_in_parquet(tmp_path):
    table = samples([[1, 2, 1, 2, END], [3, 3]], [[1, END], [2, 3]], win=[1.0, 0.5])
    table.to_parquet(tmp_path / "samples.parquet")
    assert response_metrics(pd.read_parquet(tmp_path / "samples.parquet"), 0) == response_metrics(table, 0)


def penalised_fit(wins, extra, weights):
    """Maximise the same penalised likelihood by scipy's BFGS."""
    x = np.tanh(extra / extra.std())

    def objective(coefficients):
        z = coefficients[0] + coefficients[1] * x
        likelihood = weights @ (wins * z - np.logaddexp(0, z))
        return RIDGE / 2 * (coefficients @ coefficients) - likelihood

    return expit(minimize(objective, [0, 0], method="BFGS", options={"gtol": 1e-8}).x[0])


@pytest.mark.parametrize("wins", ["mixed", "soft", "separated", "all", "none", "one"])
def test_length_controlled_win_rate_is_the_penalised_optimum(wins):
    rng = np.random.default_rng(2)
    extra = rng.normal(8, 10, size=50).round()
    outcomes = {
        "mixed": rng.integers(0, 3, size=50) / 2,
        "soft": rng.random(50),
        "separated": (extra > 8).astype(float),
        "all": np.ones(50),
        "none": np.zeros(50),
        "one": (np.arange(50) == 3).astype(float),
    }[wins]
    weights = rng.multinomial(50, np.full(50, 1 / 50), size=8).astype(float)
    found = length_controlled(outcomes, extra)(weights)
    np.testing.assert_allclose(found, [penalised_fit(outcomes, extra, row) for row in weights], atol=1e-5)


def test_length_effect_is_removed_from_the_win_rate():
    rng = np.random.default_rng(3)
    extra = rng.normal(20, 15, size=20_000)
    chance = expit(-0.5 + 2 * np.tanh(extra / 15))
    wins = rng.random(20_000) < chance
    assert wins.mean() > 0.6  # longer responses win
    found = length_controlled(wins, extra)(np.ones((1, 20_000)))
    np.testing.assert_allclose(found, expit(-0.5), atol=0.03)


def test_equal_lengths_do_not_change_the_win_rate():
    wins = np.array([1, 1, 0.5, 0, 1, 0, 1, 1, 0.5, 1] * 10)
    found = length_controlled(wins, np.zeros(100))(np.ones((1, 100)))
    np.testing.assert_allclose(found, wins.mean(), atol=1e-4)
    both_ways = length_controlled(np.append(wins, wins), np.repeat([-3, 3], 100))(np.ones((1, 200)))
    np.testing.assert_allclose(both_ways, wins.mean(), atol=1e-4)


def test_all_wins_give_a_finite_rate_near_1():
    metrics = response_metrics(samples([[1, 2, 3], [1]] * 20, [[1]] * 40, win=1.0), 0)
    assert 0.98 < metrics["length_controlled_win_rate"] < 1
    low, high = metrics["length_controlled_win_rate_ci"]
    assert 0.98 < low <= high < 1


@pytest.mark.slow
def test_length_controlled_interval_covers_the_true_value():
    rng = np.random.default_rng(4)
    covered = []
    for seed in range(150):
        extra = rng.normal(5, 10, size=120)
        wins = rng.random(120) < expit(0.4 + np.tanh(extra / 10))
        table = samples(
            [[1] * (30 + round(length)) for length in extra.clip(-29)], [[1] * 30] * 120, win=wins.astype(float)
        )
        low, high = response_metrics(table, seed)["length_controlled_win_rate_ci"]
        covered.append(low <= expit(0.4) <= high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_wins_by_source_and_by_length_against_the_reference():
    table = samples(
        [[5, END], [5, 6, 7, END], [5, 6, 7, END], [5, END], [5, END]],
        [[5, 6, END]] * 5,
        win=[1.0, 0.0, 0.5, 1.0, np.nan],
        source=["a", "a", "b", "b", "c"],
    )
    found = win_slices(table, 0).set_index(["slice", "value"])
    assert found["responses"].to_dict() == {
        ("source", "a"): 2,
        ("source", "b"): 2,
        ("length", "shorter than the reference's"): 2,
        ("length", "longer than the reference's"): 2,
    }
    assert found["win_rate"].tolist() == [0.5, 0.75, 1.0, 0.25]
    assert (found["low"] <= found["win_rate"]).all()
    assert (found["win_rate"] <= found["high"]).all()
