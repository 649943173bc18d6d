"""Signs of failure, paired comparisons, and the choice of one policy with its reason."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dpo.config import load_params
from dpo.evaluation.selection import Comparison, compare_policies, failure_signs, select

COMPARE = load_params(Path(__file__).parents[3] / "params.yaml").compare
SOUND = {
    "chosen_logp_change": -3.0, "kl": 5.0, "perplexity_ratio": 1.1, "length_ratio": 1.0, "repetition_rise": 0.0,
    "distinct_2_ratio": 1.0, "empty": 0.0, "unfinished_rise": 0.0, "margin": 0.5, "judged_gain": 0.2,
    "judged_gain_ci": [0.1, 0.3], "win_rate": 0.7, "win_rate_ci": [0.6, 0.8],
}  # fmt: skip


def tripped(**changes):
    return [sign.name for sign in failure_signs(SOUND | changes, COMPARE) if sign.tripped]


@pytest.mark.parametrize(
    ("figure", "bad", "good", "name"),
    [
        ("chosen_logp_change", -15.1, -14.9, "likelihood displacement"),
        ("kl", 10.1, 9.9, "KL blow-up"),
        ("perplexity_ratio", 2.1, 1.9, "forgetting"),
        ("length_ratio", 1.6, 1.4, "length exploitation"),
        ("repetition_rise", 0.11, 0.09, "repetition"),
        ("distinct_2_ratio", 0.69, 0.71, "lost diversity"),
        ("empty", 0.03, 0.01, "empty answers"),
        ("unfinished_rise", 0.3, 0.2, "never-ending answers"),
    ],
)
def test_each_sign_trips_past_its_limit_alone(figure, bad, good, name):
    assert tripped() == []
    assert tripped(**{figure: good}) == []
    assert tripped(**{figure: bad}) == [name]


def test_over_optimisation_needs_a_gain_surely_below_its_limit_and_a_rising_implicit_reward():
    assert tripped(judged_gain=-0.2, judged_gain_ci=[-0.3, -0.1]) == ["over-optimisation"]
    assert tripped(judged_gain=-0.2, judged_gain_ci=[-0.5, 0.1]) == []
    assert tripped(judged_gain=-0.2, judged_gain_ci=[-0.3, -0.1], margin=-0.5) == []


def test_without_a_judge_over_optimisation_is_not_claimed():
    unjudged = {name: value for name, value in SOUND.items() if not name.startswith(("judged", "win"))}
    assert "over-optimisation" not in {sign.name for sign in failure_signs(unjudged, COMPARE)}


def test_a_figure_that_the_data_does_not_give_is_no_sign():
    bare = {name: value for name, value in SOUND.items() if name != "distinct_2_ratio"}
    assert "lost diversity" not in {sign.name for sign in failure_signs(bare, COMPARE)}


def wins(share, count=200):
    return [1.0] * round(share * count) + [0.0] * round((1 - share) * count)


def test_a_real_difference_is_found_and_a_chance_one_is_a_tie():
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
    return SOUND | changes


def comparison(first, second, p):
    return Comparison(first=first, second=second, difference=0.1, low=0.0, high=0.2, p=p)


def test_the_highest_win_rate_within_the_budget_and_without_a_sign_is_selected():
    policies = {
        "far": policy(win_rate=0.9, kl=12.0),
        "best": policy(win_rate=0.8, win_rate_ci=[0.7, 0.9]),
        "next": policy(win_rate=0.7),
    }
    comparisons = [comparison("best", "reference", 0.001), comparison("next", "best", 0.01)]
    chosen, reason = select(policies, comparisons, COMPARE)
    assert chosen == "best"
    assert "best has the highest win rate, 0.800 [0.700, 0.900], among the 2 of 3 policies" in reason
    assert "Not considered: far (KL blow-up: kl 12, limit 10)" in reason
    assert "tie" not in reason.lower()


def test_ties_are_told_and_equal_ones_go_to_the_nearest():
    policies = {"near": policy(kl=2.0), "far": policy(kl=8.0)}
    comparisons = [comparison("near", "reference", 0.5), comparison("far", "near", 0.9)]
    chosen, reason = select(policies, comparisons, COMPARE)
    assert chosen == "near"
    assert "A tie with far" in reason
    assert "A tie with the reference too" in reason
    assert "the paired test tells no difference." in reason
    policies = {name: {**each, "margin": 1.0, "margin_ci": [0.5, 1.5]} for name, each in policies.items()}
    _, reason = select(policies, comparisons, dataclasses.replace(COMPARE, select="margin"))
    assert "A tie with far: the paired test tells no difference in reward accuracy." in reason


def test_no_policy_is_selected_where_each_shows_a_sign():
    chosen, reason = select({"a": policy(kl=99.0), "b": policy(empty=0.5)}, [], COMPARE)
    assert chosen is None
    assert reason == (
        "No policy is selected: each shows a sign of failure. a (KL blow-up: kl 99, limit 10); "
        "b (empty answers: empty 0.5, limit 0.02)."
    )


def test_another_figure_selects_where_params_say_so():
    policies = {
        "a": policy(margin=0.9, margin_ci=[0.8, 1.0], win_rate=0.6),
        "b": policy(margin=0.2, margin_ci=[0.1, 0.3], win_rate=0.9),
    }
    by_margin = dataclasses.replace(COMPARE, select="margin")
    assert select(policies, [], by_margin)[0] == "a"
    assert select(policies, [], COMPARE)[0] == "b"
