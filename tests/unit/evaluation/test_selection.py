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
    "distinct_2_ratio": 1.0, "empty": 0.0, "unfinished": 0.2, "reference_unfinished": 0.2, "unfinished_rise": 0.0,
    "unchanged": 0.1, "loss_rise": -0.2, "margin": 0.5, "judged_gain": 0.2,
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
        ("unfinished", 0.51, 0.49, "unfinished responses"),
        ("reference_unfinished", 0.85, 0.49, "unfinished reference"),
        ("unfinished_rise", 0.3, 0.2, "rise of unfinished responses"),
        ("kl", 0.0, 0.02, "no effect"),
        ("unchanged", 1.0, 0.9, "no effect"),
        ("loss_rise", 0.01, -0.01, "worse than the reference"),
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


def test_a_separable_best_policy_that_passes_all_guardrails_is_selected():
    policies = {
        "far": policy(win_rate=0.9, kl=12.0),
        "best": policy(win_rate=0.8, win_rate_ci=[0.7, 0.9]),
        "next": policy(win_rate=0.7, kl=1.0),
    }
    comparisons = [comparison("best", "reference", 0.001), comparison("best", "next", 0.01)]
    selection = select(policies, comparisons, COMPARE)
    assert (selection.name, selection.against_reference) == ("best", "better")
    assert selection.reason == (
        "best has the highest win rate, 0.800 [0.700, 0.900], of the policies that pass all guardrails (2 of 3; "
        "KL budget 10 nats per response). Excluded: far (KL blow-up: kl 12, limit 10). best is better than the "
        "reference: win rate 0.800 [0.700, 0.900]."
    )
    assert selection.verdict == "best is better than the reference: win rate 0.800 [0.700, 0.900]."


def test_of_policies_that_the_test_does_not_separate_the_one_with_the_least_kl_is_selected():
    policies = {"far": policy(win_rate=0.8, kl=8.0), "near": policy(kl=2.0), "weak": policy(win_rate=0.5, kl=1.0)}
    comparisons = [
        *(comparison(name, "reference", 0.001) for name in ("far", "near")),
        comparison("weak", "reference", 0.5),
        comparison("near", "far", 0.9),
        comparison("weak", "far", 0.06),
        comparison("weak", "near", 0.3),
    ]
    selection = select(policies, comparisons, COMPARE)
    assert (selection.name, selection.against_reference) == ("near", "better"), "weak does not beat the reference"
    assert "The paired test does not separate it from near, weak (p ≥ 0.05)." in selection.reason
    assert "Of these policies that beat the reference, near has the least KL, 2.00 nats" in selection.reason
    highest = select(policies, comparisons, dataclasses.replace(COMPARE, ties="highest"))
    assert (highest.name, "least KL" in highest.reason) == ("far", False)
    nothing_beats = [dataclasses.replace(each, p=0.5) for each in comparisons]
    tie = select(policies, nothing_beats, COMPARE)
    assert (tie.name, tie.against_reference) == ("weak", "tie")
    assert tie.reason.endswith(
        "weak is not significantly different from the reference: win rate 0.500 [0.600, 0.800]."
    )


def test_a_policy_that_loses_to_the_reference_is_reported_as_worse():
    lost = dataclasses.replace(comparison("only", "reference", 0.001), difference=-0.3)
    selection = select({"only": policy()}, [lost], COMPARE)
    assert (selection.name, selection.against_reference) == ("only", "worse")
    assert "only is worse than the reference" in selection.reason


def test_no_policy_is_selected_if_every_policy_fails_a_guardrail():
    selection = select({"a": policy(kl=99.0), "b": policy(empty=0.5)}, [], COMPARE)
    assert (selection.name, selection.against_reference) == (None, None)
    assert selection.reason == (
        "No policy is selected, because every policy fails a guardrail: a (KL blow-up: kl 99, limit 10), "
        "b (empty responses: empty 0.5, limit 0.02)."
    )
    assert selection.verdict == "No policy is selected, because every policy fails a guardrail."


def test_policies_that_equal_the_reference_are_reported_as_nothing_learned():
    selection = select({"a": policy(kl=0.0, unchanged=1.0), "b": policy(kl=1e-5)}, [], COMPARE)
    assert selection.name is None
    assert selection.reason.startswith("Nothing was learned. No policy is selected")


def test_compare_select_chooses_the_metric():
    policies = {
        "a": policy(margin=0.9, margin_ci=[0.8, 1.0], win_rate=0.6),
        "b": policy(margin=0.2, margin_ci=[0.1, 0.3], win_rate=0.9),
    }
    by_margin = dataclasses.replace(COMPARE, select="margin")
    assert select(policies, [], by_margin).name == "a"
    assert select(policies, [], COMPARE).name == "b"
