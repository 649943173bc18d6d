"""Metrics of held-out pairs by hand, against numpy in float64, and for a policy equal to its reference."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.special import expit

from dpo.common.errors import InputError
from dpo.evaluation.pair_metrics import pair_table, preference_metrics, reliability, slices
from dpo.training.losses import LOSSES
from dpo.training.settings import Trial


def trial(loss="sigmoid", beta=0.5):
    return Trial(loss=LOSSES[loss](), beta=beta, learning_rate=1e-5, seed=1)


def held_out(prompts, sources=None, agreement=None):
    count = len(prompts)
    return pd.DataFrame(
        {
            "id": [f"pair {number}" for number in range(count)],
            "prompt": prompts,
            "chosen": "good",
            "rejected": "bad",
            "source": sources or ["films"] * count,
            "agreement": np.full(count, np.nan) if agreement is None else agreement,
        }
    )


def table_of(margins, prompts=None, agreement=None, tokens=None, sources=None):
    """Return a table of pairs with these margins at beta 1, from a change of the chosen log-prob only."""
    margins = torch.tensor(margins, dtype=torch.float64)
    reference = torch.full((len(margins), 2), -20.0, dtype=torch.float64)
    policy = reference + torch.stack([margins, torch.zeros_like(margins)], 1)
    lengths = torch.tensor(tokens or [[4, 6]] * len(margins))
    pairs = held_out(prompts or [f"p{number}" for number in range(len(margins))], sources, agreement)
    return pair_table(pairs, policy, reference, lengths, trial(beta=1.0))


def by_hand(agreement=None):
    # beta 0.5: margins 0.5*((1)-(-1)) = 1, 0.5*((-2)-(0)) = -1, and 0 for the unchanged pair (correct 0.5).
    reference = torch.tensor([[-10.0, -10.0], [-10.0, -10.0], [-5.0, -7.0]])
    policy = torch.tensor([[-9.0, -11.0], [-12.0, -10.0], [-5.0, -7.0]])
    lengths = torch.tensor([[3, 4], [5, 6], [2, 5]])
    return pair_table(held_out([*"abc"], agreement=agreement), policy, reference, lengths, trial())


def test_pairs_by_hand():
    table = by_hand()
    assert table["id"].tolist() == ["pair 0", "pair 1", "pair 2"]
    assert table["tokens"].tolist() == [7, 11, 7]
    assert table["chosen_reward"].tolist() == [0.5, -1, 0]
    assert table["rejected_reward"].tolist() == [-0.5, 0, 0]
    assert table["margin"].tolist() == [1, -1, 0]
    assert table["correct"].tolist() == [1, 0, 0.5]
    assert table["chosen_logp_change"].tolist() == [1, -2, 0]
    np.testing.assert_allclose(table["loss"], [math.log1p(math.exp(-margin)) for margin in (1, -1, 0)])
    np.testing.assert_allclose(table["initial_loss"], [math.log(2)] * 3)
    assert table["chosen_logp"].tolist() == [-9, -12, -5]
    assert table["rejected_reference_logp"].tolist() == [-10, -10, -7]
    assert table["rejected_tokens"].tolist() == [4, 6, 5]


def test_metrics_by_hand():
    metrics = preference_metrics(by_hand(), 0, completions="both")
    assert metrics["pairs"] == 3
    assert metrics["reward_accuracy"] == 0.5
    assert metrics["margin"] == 0
    assert metrics["chosen_reward"] == pytest.approx(-0.5 / 3)
    assert metrics["rejected_reward"] == pytest.approx(-0.5 / 3)
    assert metrics["chosen_logp_change"] == pytest.approx(-1 / 3)
    assert metrics["chosen_logp_fell_share"] == pytest.approx(1 / 3)
    expected = math.log1p(math.e) + math.log1p(1 / math.e) + math.log(2)
    assert metrics["loss_rise"] == pytest.approx(expected / 3 - math.log(2))
    assert metrics["margin_p50"] == 0
    assert metrics["margin_p75"] == 0.5
    assert metrics["margin_p05"] == pytest.approx(-0.9)
    # Both: 54 nats on 25 tokens against 52. Chosen: 26 nats on 10 tokens against 25.
    assert metrics["perplexity"] == pytest.approx(math.exp(54 / 25))
    assert metrics["reference_perplexity"] == pytest.approx(math.exp(52 / 25))
    assert metrics["perplexity_ratio"] == pytest.approx(math.exp(2 / 25))
    chosen = preference_metrics(by_hand(), 0, completions="chosen")
    assert chosen["perplexity"] == pytest.approx(math.exp(26 / 10))
    assert chosen["perplexity_ratio"] == pytest.approx(math.exp(1 / 10))


def test_every_metric_has_an_interval_and_is_json():
    metrics = preference_metrics(by_hand(agreement=[0.9, 0.8, 0.7]), 0, completions="both")
    names = {name for name in metrics if not name.endswith("_ci")} - {"pairs"}
    assert {f"{name}_ci" for name in names} == {name for name in metrics if name.endswith("_ci")}
    assert {"human_ceiling", "ece", "brier", "margin_p95"} <= names
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_prompts_are_the_clusters():
    margins = np.repeat(np.random.default_rng(0).normal(size=40), 10).tolist()
    prompts = np.repeat([f"prompt {number}" for number in range(40)], 10).tolist()
    low, high = preference_metrics(table_of(margins, prompts), 0, completions="both")["margin_ci"]
    expected = 2 * stats.t.ppf(0.975, 39) * np.std(margins[::10], ddof=1) / 40**0.5
    assert high - low == pytest.approx(expected, rel=0.1)


def test_policy_equal_to_its_reference_has_accuracy_one_half_and_margin_zero():
    logps = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 50
    pairs = held_out([*"abcde"] * 4, agreement=[0.9] * 20)
    lengths = torch.full((20, 2), 5)
    metrics = preference_metrics(pair_table(pairs, logps, logps, lengths, trial()), 0, completions="both")
    assert metrics["reward_accuracy"] == 0.5
    assert metrics["margin"] == 0
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["loss_rise"] == 0
    assert metrics["perplexity_ratio"] == 1
    assert metrics["ece"] == 0
    assert metrics["brier"] == 0.25


LOSS_OF_MARGIN = {
    "sigmoid": lambda margin: np.logaddexp(0, -margin),
    "ipo": lambda margin: (margin / 0.2 - 2.5) ** 2,
    "hinge": lambda margin: np.maximum(0, 1 - margin),
    "length_normalised": lambda margin: np.logaddexp(0, -margin),
}


@pytest.mark.parametrize("loss", LOSS_OF_MARGIN)
def test_margin_and_loss_are_those_of_the_trials_loss_in_float64(loss):
    generator = torch.Generator().manual_seed(1)
    reference = -torch.rand(50, 2, generator=generator) * 100
    policy = reference + torch.randn(50, 2, generator=generator) * 5
    lengths = torch.randint(1, 40, (50, 2), generator=generator)
    table = pair_table(held_out(["p"] * 50), policy, reference, lengths, trial(loss, 0.2))
    rewards = 0.2 * (policy.double().numpy() - reference.double().numpy())
    if loss == "length_normalised":
        rewards = rewards / lengths.numpy()
    margin = rewards[:, 0] - rewards[:, 1]
    np.testing.assert_allclose(table["margin"], margin, rtol=1e-12)
    np.testing.assert_allclose(table["loss"], LOSS_OF_MARGIN[loss](margin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_non_finite_log_prob_is_an_error_that_names_the_pair(value):
    logps = torch.full((3, 2), -5.0)
    broken = logps.clone()
    broken[1, 0] = value
    with pytest.raises(InputError, match=r"'pair 1'.*learning rate"):
        pair_table(held_out([*"abc"]), broken, logps, torch.ones(3, 2), trial())


def test_metrics_of_human_agreement_need_agreement():
    metrics = preference_metrics(table_of([1.0, -1.0, 0.5]), 0, completions="both")
    assert not metrics.keys() & {"human_ceiling", "human_ceiling_ci", "ece", "ece_ci", "brier", "brier_ci"}
    assert len(reliability(table_of([1.0, -1.0, 0.5]))) == 0


def test_calibration_by_hand():
    # p = 0.7, agreement 0.9: bin 4, confidence 0.7. p = 0.28: bin 4, confidence 0.72 in rejected, agreement 0.4.
    # p = 0.98, agreement 1: bin 9. The last pair has no agreement and is left out.
    margins = [math.log(0.7 / 0.3), math.log(0.28 / 0.72), math.log(0.98 / 0.02), 5.0]
    table = table_of(margins, agreement=[0.9, 0.6, 1.0, np.nan])
    curve = reliability(table)
    np.testing.assert_allclose(curve["low"], [0.7, 0.95])
    np.testing.assert_allclose(curve["high"], [0.75, 1.0])
    assert curve["pairs"].tolist() == [2, 1]
    np.testing.assert_allclose(curve["confidence"], [0.71, 0.98])
    np.testing.assert_allclose(curve["agreement"], [0.65, 1.0])
    metrics = preference_metrics(table, 0, completions="both")
    assert metrics["human_ceiling"] == pytest.approx(2.5 / 3)
    assert metrics["ece"] == pytest.approx((2 * 0.06 + 1 * 0.02) / 3)
    first, second = 0.9 * 0.3**2 + 0.1 * 0.7**2, 0.6 * 0.72**2 + 0.4 * 0.28**2
    assert metrics["brier"] == pytest.approx((first + second + 0.02**2) / 3)


def test_confidence_1_is_in_the_last_bin():
    table = table_of([1000.0, -1000.0], agreement=[0.9, 0.4])
    curve = reliability(table)
    assert curve["high"].tolist() == [1]
    assert curve["pairs"].tolist() == [2]
    assert preference_metrics(table, 0, completions="both")["ece"] == pytest.approx(1 - (0.9 + 0.6) / 2)


def test_calibration_does_not_depend_on_the_order_of_the_completions():
    rng = np.random.default_rng(2)
    margins, agreement = rng.normal(size=200), rng.uniform(0.5, 1, size=200)
    flipped = np.where(rng.random(200) < 0.5, -1, 1)
    other = np.where(flipped == 1, agreement, 1 - agreement)
    ours, theirs = (
        preference_metrics(table_of(m.tolist(), agreement=a), 0, completions="both")
        for m, a in ((margins, agreement), (margins * flipped, other))
    )
    assert ours["ece"] == pytest.approx(theirs["ece"])
    assert ours["brier"] == pytest.approx(theirs["brier"])


def test_brier_equals_the_mean_over_sampled_people_and_a_calibrated_policy_has_ece_zero():
    rng = np.random.default_rng(3)
    margins = rng.normal(size=4000)
    p = expit(margins)
    calibrated = preference_metrics(table_of(margins.tolist(), agreement=p), 0, completions="both")
    people = rng.random(4000) < p
    assert calibrated["ece"] == pytest.approx(0, abs=1e-12)
    assert calibrated["brier"] == pytest.approx(np.mean((p - people) ** 2), abs=0.01)
    sure = preference_metrics(table_of((3 * margins).tolist(), agreement=p), 0, completions="both")
    assert sure["ece"] > 0.1
    assert sure["brier"] > calibrated["brier"]


def test_slices_by_hand():
    margins = [1.0, 3.0, -1.0, 2.0, 0.0, -2.0, 4.0, 1.0]
    tokens = [[1, 1], [2, 1], [2, 2], [2, 3], [3, 3], [3, 4], [4, 4], [5, 4]]
    prompts = [*"aaaaabbc"]
    table = slices(table_of(margins, prompts, tokens=tokens, sources=["x"] * 6 + ["y"] * 2), 0)
    rows = {(row.slice, row.value): row for row in table.itertuples()}
    assert list(rows) == [
        ("source", "x"),
        ("source", "y"),
        ("length", "2-3 tokens"),
        ("length", "4-5 tokens"),
        ("length", "6-7 tokens"),
        ("length", "8-9 tokens"),
        ("prompt", "a"),
    ]
    assert [row.pairs for row in rows.values()] == [6, 2, 2, 2, 2, 2, 5]
    assert rows["source", "x"].reward_accuracy == pytest.approx(3.5 / 6)
    assert rows["source", "y"].margin == 2.5
    assert rows["length", "4-5 tokens"].chosen_logp_change == 0.5
    assert rows["prompt", "a"].margin == 1
    assert rows["prompt", "a"].margin_low < 1 < rows["prompt", "a"].margin_high


def test_pairs_are_resampled_in_a_slice_of_one_prompt():
    margins = np.random.default_rng(4).normal(size=50).tolist()
    table = slices(table_of(margins, ["one prompt"] * 50), 0).set_index("slice")
    width = table.loc["prompt", "margin_high"] - table.loc["prompt", "margin_low"]
    assert width == pytest.approx(2 * stats.t.ppf(0.975, 49) * np.std(margins, ddof=1) / 50**0.5, rel=0.1)


def test_slices_have_at_most_twenty_prompts_and_no_rare_ones():
    prompts = [f"prompt {number}" for number in range(25) for _ in range(5 + (number == 24))] + ["rare"] * 4
    table = slices(table_of([1.0] * len(prompts), prompts), 0)
    shown = table[table["slice"] == "prompt"]
    assert len(shown) == 20
    assert shown["value"].iloc[0] == "prompt 24"
    assert "prompt" not in set(slices(table_of([1.0] * 8, [*"aaaabbbb"]), 0)["slice"])


def test_pairs_of_equal_length_are_one_slice():
    table = slices(table_of([1.0, 2.0, 3.0]), 0)
    assert table[table["slice"] == "length"]["pairs"].tolist() == [3]
