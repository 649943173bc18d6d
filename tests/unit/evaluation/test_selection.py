"""Failure modes, paired comparisons, and the selection of one policy with its reason."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dpo.config import load_params
from dpo.evaluation.selection import Comparison, compare_policies, failure_modes, select

COMPARE = load_params(Path(__file__).parents[3] / "params.yaml").compare
GOOD = {
    "chosen_logp_change": -3.0, "kl": 5.0, "perplexity_ratio": 1.1, "length_ratio": 1.0, "repetition_rise": 0.0,
    "distinct_2_ratio": 1.0, "empty": 0.0, "unfinished_rise": 0.0, "margin": 0.5, "judged_gain": 0.2,
    "judged_gain_ci": [0.1, 0.3], "win_rate": 0.7, "win_rate_ci": [0.6, 0.8],
}  # fmt: skip


def detected(**changes):
    return [mode.name for mode in failure_modes(GOOD | changes, COMPARE) if mode.detected]


@pytest.mark.parametrize(
    ("metric", "bad", "good", "name"),
    [
        ("chosen_logp_change", -15.1, -14.9, "likelihood displacement"),
        ("kl", 10.1, 9.9, "KL blow-up"),
        ("perplexity_ratio", 2.1, 1.9, "forgetting"),
        ("length_ratio", 1.6, 1.4, "length exploitation"),
        ("repetition_rise", 0.11, 0.09, "repetition"),
        ("distinct_2_ratio", 0.69, 0.71, "lost diversity"),
        ("empty", 0.03, 0.01, "empty responses"),
        ("unfinished_rise", 0.3, 0.2, "unfinished responses"),
    ],
)
def test_each_failure_mode_is_detected_beyond_its_limit(metric, bad, good, name):
    assert detected() == []
    assert detected(**{metric: good}) == []
    assert detected(**{metric: bad}) == [name]


def test_over_optimisation_needs_a_gain_significantly_below_its_limit_and_a_positive_margin():
    assert detected(judged_gain=-0.2, judged_gain_ci=[-0.3, -0.1]) == ["over-optimisation"]
    assert detected(judged_gain=-0.2, judged_gain_ci=[-0.5, 0.1]) == []
    assert detected(judged_gain=-0.2, judged_gain_ci=[-0.3, -0.1], margin=-0.5) == []


def test_over_optimisation_needs_a_judge():
    unjudged = {name: value for name, value in GOOD.items() if not name.startswith(("judged", "win"))}
    assert "over-optimisation" not in {mode.name for mode in failure_modes(unjudged, COMPARE)}


def test_failure_mode_without_its_metric_is_left_out():
    bare = {name: value for name, value in GOOD.items() if name != "distinct_2_ratio"}
    assert "lost diversity" not in {mode.name for mode in failure_modes(bare, COMPARE)}


def wins(share, count=200):
    return [1.0] * round(share * count) + [0.0] * round((1 - share) * count)


def test_large_difference_is_significant_and_chance_difference_is_a_tie():
    generator = np.random.default_rng(0)
    outcomes = {name: generator.permutation(wins(share)).tolist() for name, share in
                (("strong", 0.9), ("fair", 0.6), ("twin", 0.6))}  # fmt: skip
    found = compare_policies(outcomes, range(200), seed=0)
    verdicts = {(c.first, c.second): c.verdict for c in found}
    assert len(found) == 6
    assert verdicts["strong", "reference"] == "strong"
    assert verdicts["fair", "strong"] == "strong"
    assert verdicts["twin", "fair"] == "tie"
    strong = next(c for c in found if (c.first, c.second) == ("strong", "reference"))
    assert strong.difference == pytest.approx(0.4)
    assert strong.low < 0.4 < strong.high


def test_p_values_are_adjusted_for_the_number_of_policies():
    generator = np.random.default_rng(1)
    outcome = generator.permutation(wins(0.6)).tolist()
    others = {f"other {i}": generator.permutation(wins(0.5)).tolist() for i in range(5)}
    alone = compare_policies({"policy": outcome}, range(200), seed=0)[0]
    among = compare_policies({"policy": outcome, **others}, range(200), seed=0)[0]
    assert (among.first, among.second) == ("policy", "reference")
    assert alone.p < 0.05 < among.p
    assert alone.verdict == "policy"
    assert among.verdict == "tie"


def policy(**changes):
    return GOOD | changes


def comparison(first, second, p):
    return Comparison(first=first, second=second, difference=0.1, low=0.0, high=0.2, p=p)


def test_highest_win_rate_of_the_policies_that_pass_all_guardrails_is_selected():
    policies = {
        "far": policy(win_rate=0.9, kl=12.0),
        "best": policy(win_rate=0.8, win_rate_ci=[0.7, 0.9]),
        "next": policy(win_rate=0.7),
    }
    comparisons = [comparison("best", "reference", 0.001), comparison("next", "best", 0.01)]
    selected, reason = select(policies, comparisons, COMPARE)
    assert selected == "best"
    assert reason == (
        "best has the highest win rate, 0.800 [0.700, 0.900], of the policies that pass all guardrails (2 of 3; "
        "KL budget 10 nats per response). Excluded: far (KL blow-up: kl 12, limit 10)."
    )


def test_ties_are_reported_and_the_lowest_kl_wins_between_equal_values():
    policies = {"near": policy(kl=2.0), "far": policy(kl=8.0)}
    comparisons = [comparison("near", "reference", 0.5), comparison("far", "near", 0.9)]
    selected, reason = select(policies, comparisons, COMPARE)
    assert selected == "near"
    assert reason.endswith(
        " Its win rate is not significantly different from that of far, the reference (paired test, p ≥ 0.05)."
    )
    policies = {name: {**each, "margin": 1.0, "margin_ci": [0.5, 1.5]} for name, each in policies.items()}
    _, reason = select(policies, comparisons, dataclasses.replace(COMPARE, select="margin"))
    assert "Its reward accuracy is not significantly different from that of far, the reference" in reason


def test_no_policy_is_selected_if_every_policy_fails_a_guardrail():
    selected, reason = select({"a": policy(kl=99.0), "b": policy(empty=0.5)}, [], COMPARE)
    assert selected is None
    assert reason == (
        "No policy is selected, because every policy fails a guardrail: a (KL blow-up: kl 99, limit 10), "
        "b (empty responses: empty 0.5, limit 0.02)."
    )


def test_compare_select_chooses_the_metric():
    policies = {
        "a": policy(margin=0.9, margin_ci=[0.8, 1.0], win_rate=0.6),
        "b": policy(margin=0.2, margin_ci=[0.1, 0.3], win_rate=0.9),
    }
    by_margin = dataclasses.replace(COMPARE, select="margin")
    assert select(policies, [], by_margin)[0] == "a"
    assert select(policies, [], COMPARE)[0] == "b"
