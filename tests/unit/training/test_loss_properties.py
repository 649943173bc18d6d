"""What every loss has in common: signs, invariances and scaling."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.common.errors import InputError
from dpo.training.losses import LOSSES, Aot, AotUnpaired, Custom, DiscoPop, LdDpo, PairBatch, Sigmoid, WeightedSum
from tests.support.losses import EXAMPLES, loss_and_gradient, random_tokens

SEPARATE = {
    "rpo", "dpop", "apo_down", "orpo", "nca", "sppo_hard", "bco", "sft", "weighted_sum",
}  # fmt: skip
"""Losses whose gradient changes the likelihood of both completions together."""

SCALE_FREE = {
    "sigmoid", "conservative", "conservative, agreement", "robust", "robust, agreement", "hinge",
    "length_normalised", "dpop", "apo_zero", "apo_down", "wpo", "ld_dpo", "exo", "nca", "discopop", "aot_unpaired",
    "bco", "custom",
}  # fmt: skip
"""Functions of beta r(y)."""


def at_the_start(tokens):
    """The same pairs with a policy equal to the reference."""
    return replace(tokens, policy=tokens.reference.clone())


def per_completion(tokens, gradient):
    """The mean gradient of the tokens of each completion, [P, 2]."""
    return tokens.sums(gradient) / tokens.lengths


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_raise_chosen_and_lower_rejected_at_the_start(name):
    tokens = at_the_start(random_tokens(seed=5))
    if name.endswith("agreement"):
        tokens = replace(tokens, agreement=0.5 + tokens.agreement / 2)
    _, gradient = loss_and_gradient(EXAMPLES[name], tokens, 0.1)
    chosen, rejected = per_completion(tokens, gradient).unbind(1)
    assert (chosen <= 1e-12).all()
    assert (rejected >= -1e-12).all()
    assert (chosen < rejected).all()
    assert (chosen == 0).all() == (name == "apo_down")
    assert (rejected == 0).all() == (name == "sft")


@pytest.mark.parametrize("name", EXAMPLES)
def test_equal_completions_give_no_gradient(name):
    # Chosen and rejected share the tokens, so their gradients add up.
    tokens = random_tokens(pairs=1, seed=6)
    halves = [tokens.parts(values)[0].repeat(2) for values in (tokens.policy, tokens.reference, tokens.collisions)]
    equal = replace(tokens, lengths=tokens.lengths[:, :1].repeat(1, 2))
    equal = replace(equal, policy=halves[0], reference=halves[1], collisions=halves[2])
    _, gradient = loss_and_gradient(EXAMPLES[name], equal, 0.1)
    chosen, rejected = equal.parts(gradient)
    assert torch.allclose(chosen + rejected, torch.zeros_like(chosen), atol=1e-12) == (name not in SEPARATE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_order_of_the_pairs_does_not_matter(name):
    tokens = random_tokens(seed=7)
    losses, gradient = loss_and_gradient(EXAMPLES[name], tokens, 0.1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    permuted = tokens.select(order)
    others, other_gradient = loss_and_gradient(EXAMPLES[name], permuted, 0.1)
    torch.testing.assert_close(others, losses[order])
    torch.testing.assert_close(permuted.sums(other_gradient), tokens.sums(gradient)[order])


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_do_not_change_losses_and_gradients(name, size):
    tokens = random_tokens(seed=8)
    losses, gradient = loss_and_gradient(EXAMPLES[name], tokens, 0.1)
    for start in range(0, 24, size):
        places = list(range(start, min(start + size, 24)))
        part = tokens.select(places)
        part = replace(part, policy=part.policy + 1e-9)  # a packed batch rounds differently
        ours, our_gradient = loss_and_gradient(EXAMPLES[name], part, 0.1, step=tokens)
        torch.testing.assert_close(ours, losses[places], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.sums(our_gradient), tokens.sums(gradient)[places], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SCALE_FREE | {"ipo", "ipo, averaged", "sppo_hard"}))
@pytest.mark.parametrize("beta", [0.01, 3.0])
def test_scaling_with_beta(name, beta):
    tokens, loss = random_tokens(seed=9), EXAMPLES[name]
    losses, _ = loss_and_gradient(loss, tokens, beta)
    scaled = replace(tokens, policy=tokens.reference + beta * (tokens.policy - tokens.reference))
    if "collision_logps" in loss.needs:  # keep the weights of WPO
        scaled = replace(scaled, collisions=tokens.collisions + scaled.policy - tokens.policy)
    others, _ = loss_and_gradient(loss, scaled, 1.0)
    torch.testing.assert_close(losses, others if name in SCALE_FREE else others / beta**2)


@pytest.mark.parametrize(
    ("name", "nats"),
    # A log-prob of 999 is only a stand-in for a low reference, which the weight of WPO does not use.
    [(name, nats) for name in EXAMPLES for nats in (1000.0, -1000.0) if nats < 0 or "wpo" not in name],
)
@pytest.mark.parametrize("side", [0, 1])
def test_log_ratios_of_a_thousand_nats_stay_finite(name, nats, side):
    logps = torch.tensor([-1.0, -1.0])
    tokens = replace(random_tokens(1), policy=logps.clone(), reference=logps, collisions=logps)
    tokens = replace(tokens, lengths=torch.ones(1, 2, dtype=torch.long), agreement=torch.tensor([0.8]))
    tokens.policy[side] += nats
    for values in loss_and_gradient(EXAMPLES[name], tokens, 1.0):
        assert values.isfinite().all()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(name, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        EXAMPLES[name](PairBatch(*torch.ones(3, 1, 2)), beta)


@pytest.mark.parametrize("name", ["conservative, agreement", "robust, agreement", "aot", "aot_unpaired"])
def test_a_loss_names_the_field_that_it_misses(name):
    with pytest.raises(ValueError, match=r"this loss needs PairBatch\.\w+"):
        EXAMPLES[name](PairBatch(*torch.ones(2, 1, 2), torch.ones(1, 2, dtype=torch.long)), 0.1)


@pytest.mark.parametrize("loss", [LdDpo(alpha=1.0), Aot(), AotUnpaired()])
def test_special_cases_of_dpo(loss):
    # LD-DPO with alpha 1, and AOT in steps of one pair.
    tokens = random_tokens(pairs=1 if "statistics" in loss.needs else 24, seed=3)
    for ours, expected in zip(
        loss_and_gradient(loss, tokens, 0.2), loss_and_gradient(Sigmoid(), tokens, 0.2), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["wpo", "ld_dpo"])
def test_without_values_per_token_a_loss_is_that_of_dpo(name):
    pairs = random_tokens().batch(Sigmoid(), 0.1)
    summed = PairBatch(pairs.policy, pairs.reference, pairs.lengths)
    assert torch.equal(EXAMPLES[name](summed, 0.1), Sigmoid()(summed, 0.1))
    assert not torch.allclose(EXAMPLES[name](pairs, 0.1), Sigmoid()(pairs, 0.1))


def test_rpo_is_the_sum_of_sigmoid_and_likelihood():
    tokens = random_tokens(seed=3)
    total = WeightedSum(weights={"sigmoid": 1.0, "sft": 0.4})
    for ours, expected in zip(
        loss_and_gradient(total, tokens, 0.2), loss_and_gradient(EXAMPLES["rpo"], tokens, 0.2), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_a_sum_needs_what_its_parts_need():
    assert WeightedSum(weights={"simpo": 1.0, "sft": 1.0}).needs == frozenset()
    assert EXAMPLES["weighted_sum, wpo"].needs == {
        "reference", "statistics", "token_logps", "reference_token_logps", "collision_logps"
    }  # fmt: skip


def test_discopop_has_a_local_minimum_at_a_negative_margin():
    h = torch.linspace(-3, 3, 601, dtype=torch.float64)
    pairs = PairBatch(torch.stack([h, 0 * h], 1), torch.zeros(601, 2), torch.ones(601, 2))
    losses = DiscoPop()(pairs, 1.0).numpy()
    (minimum,) = np.flatnonzero((losses[1:-1] < losses[:-2]) & (losses[1:-1] < losses[2:])) + 1
    assert h[minimum].item() == pytest.approx(-0.12)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("tests.support.losses:absent", "cannot be imported: .*absent"),
        ("absent_module:loss", "cannot be imported: ModuleNotFoundError: No module named 'absent_module'"),
        ("", "cannot be imported"),
        ("tests.unit.training.test_loss_properties:per_pair", r"cannot be called as per_pair\(pairs, beta\)"),
        ("tests.unit.training.test_loss_properties:total", r"shape \(\) for 2 pairs; return one loss per pair"),
    ],
)
def test_a_wrong_function_of_the_user_is_named(function, words):
    pairs = PairBatch(*torch.ones(3, 2, 2))
    with pytest.raises(InputError, match=words):
        Custom(function=function)(pairs, 0.1)


def test_the_example_of_the_documentation_is_a_loss():
    root = Path(__file__).parents[3]
    shown = re.search(r"```python\n(.*?)```", (root / "docs/reference/losses.md").read_text(), re.DOTALL)[1]
    assert shown in (root / "functions/losses/squared_hinge.py").read_text()
    pairs = random_tokens().batch(Sigmoid(), 0.1)
    h = (pairs.policy - pairs.reference).diff()[:, 0].neg()
    loss = Custom(function="functions.losses.squared_hinge:squared_hinge")
    torch.testing.assert_close(loss(pairs, 0.1), (1 - 0.1 * h).clamp(min=0) ** 2)


def total(pairs, beta):
    return pairs.policy.sum()


def per_pair(pairs):
    return pairs.policy.sum(1)


def test_reference_free_losses_are_those_without_a_reference():
    assert {name for name, cls in LOSSES.items() if "reference" not in cls().needs} == {"simpo", "orpo", "sft"}
