"""Every loss and its gradient against plain Python in float64, and against TRL 1.16."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo.training.losses import LOSSES
from tests.support.losses import EXAMPLES, LABELLED, loss_and_gradient, random_tokens, trl_loss

BETAS = [0.05, 0.3, 2.0]


def test_every_loss_is_tested():
    tested = {loss.name for loss in EXAMPLES.values()}
    assert tested | {*LABELLED} == set(LOSSES)
    assert tested == {name.split(",")[0] for name in EXAMPLES}
    assert all(LOSSES[name].name == name for name in LOSSES)


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return math.exp(-softplus(-x))


class Pair:
    """One pair: lists of log-probs per token, and what a formula needs of them."""

    def __init__(self, tokens, frozen, number):
        (self.w, self.l), (self.ref_w, self.ref_l), self.collisions, self.frozen = (
            [part.tolist() for part in tokens.parts(values)[2 * number : 2 * number + 2]]
            for values in (tokens.policy, tokens.reference, tokens.collisions, frozen.policy)
        )
        self.agreement = tokens.agreement[number].item()
        self.r_w, self.r_l = sum(self.w) - sum(self.ref_w), sum(self.l) - sum(self.ref_l)
        self.h = self.r_w - self.r_l
        self.mean_w, self.mean_l = np.mean(self.w), np.mean(self.l)

    def wpo_weight(self):
        return math.prod(
            math.exp(sum(a - b for a, b in zip(logps, collisions, strict=True)) / len(logps))
            for logps, collisions in zip(self.frozen, self.collisions, strict=True)
        )

    def desensitized(self, alpha):
        shared = min(len(self.w), len(self.l))
        sides = ((self.w, self.ref_w), (self.l, self.ref_l))
        sums = [
            sum((1 if t < shared else alpha) * (p - q) for t, (p, q) in enumerate(zip(*side, strict=True)))
            for side in sides
        ]
        return sums[0] - sums[1]


def odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def exo(p, beta):
    q = sigmoid(beta * p.h)
    return q * math.log(q / 0.98) + (1 - q) * math.log((1 - q) / 0.02)


def discopop(p, beta):
    z = beta * p.h
    share = sigmoid(z / 0.2)
    return softplus(-z) * (1 - share) + math.exp(-z) * share


BY_PAIR = {
    "sigmoid": lambda p, beta: softplus(-beta * p.h),
    "ipo": lambda p, beta: (p.h - 1 / (2 * beta)) ** 2,
    "ipo, averaged": lambda p, beta: (p.r_w / len(p.w) - p.r_l / len(p.l) - 1 / (2 * beta)) ** 2,
    "conservative": lambda p, beta: 0.9 * softplus(-beta * p.h) + 0.1 * softplus(beta * p.h),
    "conservative, agreement": lambda p, beta: (
        p.agreement * softplus(-beta * p.h) + (1 - p.agreement) * softplus(beta * p.h)
    ),
    "robust": lambda p, beta: (0.8 * softplus(-beta * p.h) - 0.2 * softplus(beta * p.h)) / 0.6,
    "robust, agreement": lambda p, beta: (
        (p.agreement * softplus(-beta * p.h) - (1 - p.agreement) * softplus(beta * p.h)) / (2 * p.agreement - 1)
    ),
    "hinge": lambda p, beta: max(0, 1 - beta * p.h),
    "length_normalised": lambda p, beta: softplus(-beta * (p.r_w / len(p.w) - p.r_l / len(p.l))),
    "rpo": lambda p, beta: softplus(-beta * p.h) - 0.4 * p.mean_w,
    "dpop": lambda p, beta: softplus(-beta * (p.h - 4 * max(0, -p.r_w))),
    "apo_zero": lambda p, beta: 1 - sigmoid(beta * p.r_w) + sigmoid(beta * p.r_l),
    "apo_down": lambda p, beta: sigmoid(beta * p.r_w) + 1 - sigmoid(beta * p.h),
    "simpo": lambda p, beta: softplus(-beta * p.mean_w + beta * p.mean_l + beta * 0.3),
    "orpo": lambda p, beta: -p.mean_w + beta * softplus(odds(p.mean_l) - odds(p.mean_w)),
    "wpo": lambda p, beta: p.wpo_weight() * softplus(-beta * p.h),
    "ld_dpo": lambda p, beta: softplus(-beta * p.desensitized(0.3)),
    "exo": exo,
    "nca": lambda p, beta: softplus(-beta * p.r_w) + softplus(beta * p.r_w) / 2 + softplus(beta * p.r_l) / 2,
    "sppo_hard": lambda p, beta: (p.r_w - 0.5 / beta) ** 2 + (p.r_l + 0.5 / beta) ** 2,
    "discopop": discopop,
    "bco": lambda p, beta: softplus(-beta * p.r_w) + softplus(beta * p.r_l),
    "sft": lambda p, beta: -p.mean_w,
    "weighted_sum": lambda p, beta: (
        0.8 * softplus(-beta * p.h) + 0.2 * (softplus(-beta * p.r_w) + softplus(beta * p.r_l)) - p.mean_w
    ),
    "custom": lambda p, beta: softplus(1 - beta * p.h),
}


def aot(pairs, beta):
    policy = sorted(sum(p.w) - sum(p.l) for p in pairs)
    reference = sorted(sum(p.ref_w) - sum(p.ref_l) for p in pairs)
    return sum(softplus(-beta * (a - b)) for a, b in zip(policy, reference, strict=True))


def aot_unpaired(pairs, beta):
    chosen, rejected = sorted(p.r_w for p in pairs), sorted(p.r_l for p in pairs)
    return sum(softplus(-beta * (a - b)) for a, b in zip(chosen, rejected, strict=True))


def step_wide_sum(pairs, beta):
    others = sum(1.5 * BY_PAIR["wpo"](p, beta) + softplus(-beta * p.desensitized(0.5)) for p in pairs)
    return 0.5 * aot(pairs, beta) + 2 * aot_unpaired(pairs, beta) + others


BY_STEP = {"aot": aot, "aot_unpaired": aot_unpaired, "weighted_sum, wpo": step_wide_sum}


def naive(name, tokens, beta, frozen=None):
    """The sum of the losses of all pairs."""
    pairs = [Pair(tokens, frozen or tokens, number) for number in range(len(tokens.lengths))]
    return BY_STEP[name](pairs, beta) if name in BY_STEP else sum(BY_PAIR[name](p, beta) for p in pairs)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("beta", BETAS)
def test_losses_and_gradients_equal_plain_python(name, beta):
    tokens = random_tokens(pairs=6, seed=2)
    losses, gradient = loss_and_gradient(EXAMPLES[name], tokens, beta)
    assert losses.shape == (6,)
    assert losses.sum().item() == pytest.approx(naive(name, tokens, beta), rel=1e-10)
    if name in BY_PAIR:
        pairs = [Pair(tokens, tokens, number) for number in range(6)]
        assert losses.tolist() == pytest.approx([BY_PAIR[name](p, beta) for p in pairs], rel=1e-10)
    step = 1e-6
    for place in range(len(tokens.policy)):
        moved = [tokens.policy.clone() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (naive(name, replace(tokens, policy=policy), beta, tokens) for policy in moved)
        assert gradient[place].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", EXAMPLES)
def test_losses_in_fp32_equal_those_in_fp64(name):
    double = random_tokens(seed=4)
    single = random_tokens(seed=4, dtype=torch.float32)
    losses, gradient = loss_and_gradient(EXAMPLES[name], double, 0.1)
    ours, our_gradient = loss_and_gradient(EXAMPLES[name], single, 0.1)
    assert ours.dtype == our_gradient.dtype == torch.float32
    torch.testing.assert_close(ours.double(), losses, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(our_gradient.double(), gradient, rtol=2e-4, atol=2e-5)


TRL = {
    "sigmoid": {"types": ["sigmoid"]},
    "ipo, averaged": {"types": ["ipo"]},
    "robust": {"types": ["robust"], "smoothing": 0.2},
    "hinge": {"types": ["hinge"]},
    "length_normalised": {"types": ["sigmoid_norm"]},
    "apo_zero": {"types": ["apo_zero"]},
    "apo_down": {"types": ["apo_down"]},
    "wpo": {"types": ["sigmoid"], "weighting": True},
    "ld_dpo": {"types": ["sigmoid"], "ld_alpha": 0.3},
    "exo": {"types": ["exo_pair"], "smoothing": 0.02},
    "nca": {"types": ["nca_pair"]},
    "sppo_hard": {"types": ["sppo_hard"]},
    "discopop": {"types": ["discopop"], "tau": 0.2},
    "aot": {"types": ["aot"]},
    "aot_unpaired": {"types": ["aot_unpaired"]},
    "bco": {"types": ["bco_pair"]},
}
"""Losses that `DPOTrainer` has, by the arguments of `trl_loss`."""


def assert_equals_trl(name, tokens, beta, **settings):
    leaf = tokens.policy.clone().requires_grad_()
    expected = trl_loss(tokens, leaf, beta, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    losses, gradient = loss_and_gradient(EXAMPLES[name], tokens, beta)
    torch.testing.assert_close(losses.mean(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient / len(losses), expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("beta", BETAS)
def test_losses_and_gradients_equal_those_of_trl(name, beta):
    assert_equals_trl(name, random_tokens(pairs=16, seed=1), beta, **TRL[name])


@pytest.mark.parametrize(
    ("name", "types", "weights", "smoothing"),
    [
        ("rpo", ["sigmoid", "sft"], [1.0, 0.4], 0),
        ("sft", ["sft"], None, 0),
        ("weighted_sum", ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], 0),
        ("conservative", ["aot"], None, 0.1),  # of one pair
    ],
)
def test_losses_equal_those_of_trl_pair_by_pair(name, types, weights, smoothing):
    # TRL averages the likelihood over all tokens of a batch, here it is averaged per pair.
    tokens = random_tokens(pairs=8, seed=1)
    for number in range(8):
        one = tokens.select([number])
        assert_equals_trl(name, one, 0.3, types=types, weights=weights, smoothing=smoothing)


def averages(tokens):
    policy = tokens.sums(tokens.policy) / tokens.lengths
    return policy[:, 0], policy[:, 1]


@pytest.mark.parametrize("beta", BETAS)
def test_simpo_equals_that_of_trl(beta):
    from trl.experimental.cpo import CPOTrainer

    tokens = random_tokens(pairs=16, seed=1)
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", simpo_gamma=0.3 * beta, beta=beta,
        label_smoothing=0.0,
    )  # fmt: skip
    expected, chosen, rejected = CPOTrainer.cpo_loss(trainer, *averages(tokens))
    losses, _ = loss_and_gradient(EXAMPLES["simpo"], tokens, beta)
    torch.testing.assert_close(losses, expected)
    rewards = EXAMPLES["simpo"].rewards(tokens.sums(tokens.policy), None, tokens.lengths, beta)
    torch.testing.assert_close(rewards, torch.stack([chosen, rejected], 1))


@pytest.mark.parametrize("beta", BETAS)
def test_orpo_equals_that_of_trl(beta):
    from trl.experimental.orpo import ORPOTrainer

    tokens = random_tokens(pairs=16, seed=1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=beta)
    ratios, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, *averages(tokens))
    losses, _ = loss_and_gradient(EXAMPLES["orpo"], tokens, beta)
    expected = -averages(tokens)[0] - ratios
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, check_dtype=False)  # TRL rounds to fp32
    rewards = EXAMPLES["orpo"].rewards(tokens.sums(tokens.policy), None, tokens.lengths, beta)
    torch.testing.assert_close(rewards, torch.stack([chosen, rejected], 1), check_dtype=False)
