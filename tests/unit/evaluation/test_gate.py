"""The error rate and the power of the gate by simulation, with fixed seeds; its prompts and levels."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpo.evaluation.bootstrap import paired_test
from dpo.evaluation.gate import gate_prompts, kept_for_gate, prompts_needed, significance_level
from dpo.evaluation.settings import PromoteSettings

DEFAULT = PromoteSettings()
RESPONSES, TRIALS, NIGHTS = 512, 24, 30


@functools.cache
def one_sided_p(won: int, lost: int) -> float:
    """Return p of the gate's test on one response to each of 512 prompts; the others are ties."""
    differences = [0.5] * won + [-0.5] * lost + [0.0] * (RESPONSES - won - lost)
    return paired_test(differences, range(RESPONSES), 0) / 2


def promoted(won: int, lost: int, comparison: int) -> bool:
    return won > lost and one_sided_p(won, lost) <= significance_level(comparison, DEFAULT)


def promoted_in_30_nights(rng: np.random.Generator, *, new_responses: bool) -> bool:
    """Choose the best of 24 policies that equal the champion every night, and let the gate decide."""
    for night in range(1, NIGHTS + 1):
        choice = rng.binomial(RESPONSES, 0.5, TRIALS).max()
        won = rng.binomial(RESPONSES, 0.5) if new_responses else choice
        if promoted(int(won), int(RESPONSES - won), night):
            return True
    return False


def test_an_equal_policy_is_promoted_in_30_nights_with_a_probability_of_at_most_2_5_percent():
    rng, runs = np.random.default_rng(0), 4000
    count = sum(promoted_in_30_nights(rng, new_responses=True) for _ in range(runs))
    assert 0.005 * runs < count <= stats.binom.ppf(0.99, runs, 0.025)
    exact = 1 - np.prod([1 - discrete_level(night) for night in range(1, NIGHTS + 1)])
    assert 0.015 < exact <= 0.025
    assert count == pytest.approx(exact * runs, abs=4 * np.sqrt(exact * runs))


def discrete_level(night: int) -> float:
    """Return the probability that 512 fair coins reach the level of a night, from the binomial distribution."""
    tail = stats.binom.sf(np.arange(RESPONSES) - 1, RESPONSES, 0.5)
    return tail[tail <= significance_level(night, DEFAULT)].max()


def test_a_gate_on_the_responses_of_the_choice_would_promote_equal_policies():
    rng = np.random.default_rng(1)
    assert np.mean([promoted_in_30_nights(rng, new_responses=False) for _ in range(100)]) > 0.3


@pytest.mark.parametrize(("night", "rate", "ties"), [(1, 0.65, 0), (30, 0.65, 0), (1, 0.65, 0.3), (30, 0.65, 0.3)])
def test_a_policy_with_a_win_rate_of_0_65_is_promoted_in_one_night_with_a_probability_above_0_8(night, rate, ties):
    rng = np.random.default_rng(2)
    chances = [rate - ties / 2, ties, 1 - rate - ties / 2]
    nights = [promoted(*rng.multinomial(RESPONSES, chances)[[0, 2]].tolist(), night) for _ in range(1000)]
    assert np.mean(nights) > 0.97


def test_levels_of_any_30_consecutive_comparisons_sum_to_the_error_rate_and_fall_within_a_block():
    levels = [significance_level(comparison, DEFAULT) for comparison in range(1, 100)]
    for start in (0, 1, 17, 60):
        assert sum(levels[start : start + NIGHTS]) == pytest.approx(0.025)
    assert levels[:30] == sorted(levels[:30], reverse=True)
    assert levels[30] == levels[0] == pytest.approx(0.025 / sum(1 / n for n in range(1, 31)))
    assert significance_level(9, dataclasses.replace(DEFAULT, nights=1)) == 0.025


@pytest.mark.parametrize("night", [1, 7, 30])
def test_prompts_needed_is_the_minimum_of_the_sign_test(night):
    level = significance_level(night, DEFAULT)
    needed = prompts_needed(level)
    one_sided = [paired_test([0.5] * count, range(count), 0) / 2 for count in (needed - 1, needed)]
    assert one_sided[1] <= level < one_sided[0]


def table(prompts: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"prompt": prompts, "id": range(len(prompts))})


def test_the_gate_uses_prompts_that_the_choice_did_not_use_if_they_are_half_of_all():
    held_out = table([f"prompt {number}" for number in range(100)])
    rows, fresh = gate_prompts(held_out, {f"prompt {number}" for number in range(50)}, 120, seed=3)
    assert fresh
    assert set(rows["id"]) == set(range(50, 100))
    assert rows["id"].value_counts().isin([2, 3]).all(), "every row equally often, up to one"
    rows, fresh = gate_prompts(held_out, {f"prompt {number}" for number in range(60)}, 30, seed=3)
    assert (fresh, rows["id"].nunique()) == (False, 30)
    assert not rows.equals(gate_prompts(held_out, set(), 30, seed=4)[0])


def test_without_a_judge_choice_and_gate_share_no_prompt():
    prompts = [f"prompt {number}" for number in range(400)]
    kept = kept_for_gate(prompts)
    assert 0.4 < kept.mean() < 0.6
    assert (kept_for_gate(prompts[::-1]) == kept[::-1]).all()
