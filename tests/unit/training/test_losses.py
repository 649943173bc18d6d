"""The losses of h against closed forms with gradients by hand, and the identities that their papers state."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from dpo.training.losses import (
    Conservative,
    Dpop,
    Hinge,
    Ipo,
    LengthNormalised,
    PairBatch,
    Robust,
    Rpo,
    Sigmoid,
)

BETAS = [0.01, 0.1, 0.5, 2.0]
CONSERVATIVE, ROBUST, SFT_WEIGHT, PENALTY = 0.1, 0.2, 0.4, 4.0

CASES = {
    "sigmoid": Sigmoid(),
    "ipo": Ipo(),
    "ipo, averaged": Ipo(average_over_tokens=True),
    "conservative": Conservative(label_smoothing=CONSERVATIVE),
    "robust": Robust(label_smoothing=ROBUST),
    "hinge": Hinge(),
    "length_normalised": LengthNormalised(),
    "rpo": Rpo(sft_weight=SFT_WEIGHT),
    "dpop": Dpop(penalty=PENALTY),
}
"""Losses with settings that differ from each other. `test_loss_references.py` has all losses."""

AVERAGED = ("ipo, averaged", "length_normalised")
"""Losses that divide log-ratios by the number of tokens."""


def random_pairs(pairs=64, seed=0, dtype=torch.float32):
    """Log-probs and lengths [pairs, 2]; the policy is up to some 20 nats off the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = -torch.rand(pairs, 2, generator=generator) * 200
    policy = reference + torch.randn(pairs, 2, generator=generator) * 10
    lengths = torch.randint(1, 9, (pairs, 2), generator=generator)
    return policy.to(dtype), reference.to(dtype), lengths


def loss_and_gradients(policy, reference, lengths, beta, loss):
    """Losses, rewards and the gradients of the summed losses in policy and reference."""
    leaves = [policy.clone().requires_grad_(), reference.clone().requires_grad_()]
    losses = loss(PairBatch(*leaves, lengths), beta)
    rewards = loss.rewards(policy, reference, lengths, beta)
    return losses.detach(), rewards, *torch.autograd.grad(losses.sum(), leaves)


def closed_form(policy, reference, lengths, beta, loss):
    """The same in float64, gradients by hand; -log sigmoid(z) = softplus(-z), softplus(z) = softplus(-z) + z."""
    policy, reference, lengths = (t.double().numpy() for t in (policy, reference, lengths))
    ratios = policy - reference
    weights = 1 / lengths if loss in AVERAGED else np.ones_like(lengths)
    if loss == "dpop":
        weights[:, 0] += PENALTY * (ratios[:, 0] < 0)
    z = beta * (weights[:, 0] * ratios[:, 0] - weights[:, 1] * ratios[:, 1])
    losses, slope = np.logaddexp(0, -z), -expit(-z)
    if loss.startswith("ipo"):
        losses, slope = z**2 / beta**2 - z / beta**2 + 1 / (4 * beta**2), (2 * z - 1) / beta**2
    if loss == "conservative":
        losses, slope = losses + CONSERVATIVE * z, slope + CONSERVATIVE
    if loss == "robust":
        share = ROBUST / (1 - 2 * ROBUST)
        losses, slope = losses - share * z, slope - share
    if loss == "hinge":
        losses, slope = np.where(z < 1, 1 - z, 0), np.where(z < 1, -1, 0)
    gradient = beta * slope[:, None] * weights * [1, -1]
    in_policy = gradient.copy()
    if loss == "rpo":
        losses = losses - SFT_WEIGHT * policy[:, 0] / lengths[:, 0]
        in_policy[:, 0] -= SFT_WEIGHT / lengths[:, 0]
    rewards = beta * ratios / (lengths if loss in AVERAGED else 1)
    return losses, rewards, in_policy, -gradient


BY_HAND = {
    "sigmoid": (0.2014132780, 1.5019290813),  # log(1 + e^-1.5), log(1 + e^1.25)
    "ipo": (4.0, 12.25),  # (3 - 1)^2, (-2.5 - 1)^2
    "ipo, averaged": (0.0, 3.0625),  # (2/4 + 1/2 - 1)^2, (-2/8 - 0.5/1 - 1)^2
    "conservative": (0.3514132780, 1.3769290813),  # sigmoid + 0.1 * 1.5, sigmoid - 0.1 * 1.25
    "robust": (-0.2985867220, 1.9185957480),  # sigmoid - 0.2 / 0.6 * 1.5, sigmoid + 0.2 / 0.6 * 1.25
    "hinge": (0.0, 2.25),  # 1 - 1.5 is below 0, 1 + 1.25
    "length_normalised": (0.4740769842, 0.8981232641),  # 0.5 * (2/4 + 1/2) = 0.5, 0.5 * (-2/8 - 0.5/1) = -0.375
    "rpo": (1.2014132780, 2.2019290813),  # sigmoid + 0.4 * 10/4, sigmoid + 0.4 * 14/8
    "dpop": (0.2014132780, 5.2552337982),  # chosen gained; chosen lost 2: log(1 + e^(0.5 * (2.5 + 4 * 2)))
}


@pytest.mark.parametrize("loss", CASES)
def test_losses_by_hand(loss):
    # Log-ratios (2, -1) and (-2, 0.5): h = 3 and -2.5, with beta 0.5 margins of 1.5 and -1.25.
    policy = torch.tensor([[-10.0, -9.0], [-14.0, -7.5]], dtype=torch.float64)
    reference = torch.tensor([[-12.0, -8.0], [-12.0, -8.0]], dtype=torch.float64)
    lengths = torch.tensor([[4, 2], [8, 1]])
    losses = CASES[loss](PairBatch(policy, reference, lengths), 0.5)
    rewards = CASES[loss].rewards(policy, reference, lengths, 0.5)
    assert losses.tolist() == pytest.approx(BY_HAND[loss], abs=1e-10)
    plain, normalised = [[1.0, -0.5], [-1.0, 0.25]], [[0.25, -0.25], [-0.125, 0.25]]
    assert rewards.tolist() == (normalised if loss in AVERAGED else plain)


def test_the_gradient_by_hand_is_that_of_eq_7():
    # -beta * sigmoid(-1.5) = -0.5 * 0.1824255238
    policy, reference = torch.tensor([[-10.0, -9.0]]).double(), torch.tensor([[-12.0, -8.0]]).double()
    _, _, in_policy, in_reference = loss_and_gradients(policy, reference, torch.ones(1, 2), 0.5, Sigmoid())
    assert in_policy[0].tolist() == pytest.approx([-0.0912127619, 0.0912127619], abs=1e-10)
    assert in_reference[0].tolist() == pytest.approx([0.0912127619, -0.0912127619], abs=1e-10)


@pytest.mark.parametrize("loss", CASES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_rewards_and_gradients_equal_the_closed_form_in_float64(loss, beta, dtype):
    pairs = random_pairs(dtype=dtype)
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for ours, expected in zip(
        loss_and_gradients(*pairs, beta, CASES[loss]), closed_form(*pairs, beta, loss), strict=True
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected, **close)


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_summed_over_tokens_is_the_formula_of_the_paper(beta):
    # Azar et al. 2023, eq. 17: (log of the ratio of the ratios of probabilities - 1 / (2 tau))^2.
    policy, reference, lengths = random_pairs(dtype=torch.float64)
    chosen, rejected = ((policy - reference) / 10).exp().unbind(1)
    losses = Ipo()(PairBatch(policy / 10, reference / 10, lengths), beta)
    torch.testing.assert_close(losses, ((chosen / rejected).log() - 1 / (2 * beta)) ** 2)


@pytest.mark.parametrize("loss", CASES)
def test_only_averaged_losses_and_rpo_depend_on_lengths(loss):
    policy, reference, lengths = random_pairs()
    losses, rewards, *_ = loss_and_gradients(policy, reference, lengths, 0.1, CASES[loss])
    others, other_rewards, *_ = loss_and_gradients(policy, reference, lengths + 1, 0.1, CASES[loss])
    assert torch.equal(losses, others) == (loss not in (*AVERAGED, "rpo"))
    assert torch.equal(rewards, other_rewards) == (loss not in AVERAGED)


@pytest.mark.parametrize("loss", [Conservative(label_smoothing=0.0), Robust(label_smoothing=0.0)])
def test_without_label_smoothing_it_is_the_sigmoid_loss(loss):
    pairs = random_pairs()
    plain = loss_and_gradients(*pairs, 0.1, Sigmoid())
    for ours, expected in zip(loss_and_gradients(*pairs, 0.1, loss), plain, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.49])
def test_the_mean_of_the_robust_loss_over_flipped_labels_is_the_sigmoid_loss(rate):
    pairs = random_pairs(dtype=torch.float64)
    robust = Robust(label_smoothing=rate)
    as_labelled = loss_and_gradients(*pairs, 0.1, robust)
    flipped = loss_and_gradients(*(t.flip(1) for t in pairs), 0.1, robust)
    clean = loss_and_gradients(*pairs, 0.1, Sigmoid())
    for kept, swapped, expected in zip(as_labelled[2:], flipped[2:], clean[2:], strict=True):
        torch.testing.assert_close((1 - rate) * kept + rate * swapped.flip(1), expected, rtol=1e-10, atol=1e-12)
    mean = (1 - rate) * as_labelled[0] + rate * flipped[0]
    torch.testing.assert_close(mean, clean[0], rtol=1e-10, atol=1e-12)


def margins(h):
    """Log-probs of pairs whose log-ratios differ by h, all of it the gain of chosen, and lengths of one token."""
    reference = torch.full((len(h), 2), -3.0, dtype=torch.float64)
    return torch.stack([reference[:, 0] + h, reference[:, 1]], 1), reference, torch.ones(len(h), 2)


@pytest.mark.parametrize("beta", BETAS)
def test_the_minimum_of_ipo_is_at_h_of_half_the_inverse_of_beta(beta):
    h = 1 / (2 * beta) + torch.tensor([0.0, -0.1, 0.1, -5.0, 5.0], dtype=torch.float64)
    losses, _, in_policy, _ = loss_and_gradients(*margins(h), beta, Ipo())
    assert losses.tolist() == pytest.approx([0, 0.01, 0.01, 25, 25], abs=1e-10)
    assert in_policy[:, 0].tolist() == pytest.approx([0, -0.2, 0.2, -10, 10], abs=1e-10)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_the_minimum_of_conservative_is_where_the_preference_probability_is_that_of_the_labels(rate):
    best = logit(1 - rate) / 0.1
    h = best + torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)
    losses, _, in_policy, _ = loss_and_gradients(*margins(h), 0.1, Conservative(label_smoothing=rate))
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert losses[0].item() == pytest.approx(entropy, rel=1e-12)
    assert in_policy[0, 0].item() == pytest.approx(0, abs=1e-15)
    assert in_policy[1, 0] < 0 < in_policy[2, 0]


def test_hinge_stops_at_a_margin_of_one():
    h = torch.tensor([5.0, 9.999, 10.001, 50.0], dtype=torch.float64)
    losses, _, in_policy, _ = loss_and_gradients(*margins(h), 0.1, Hinge())
    assert losses.tolist() == pytest.approx([0.5, 0.0001, 0, 0], abs=1e-12)
    assert in_policy[:, 0].tolist() == [-0.1, -0.1, 0, 0]


def test_dpop_is_the_sigmoid_loss_unless_chosen_is_less_likely_than_under_the_reference():
    policy, reference, lengths = random_pairs()
    policy[0] = reference[0]  # where training starts
    losses, _, in_policy, _ = loss_and_gradients(policy, reference, lengths, 0.1, CASES["dpop"])
    plain, _, in_plain, _ = loss_and_gradients(policy, reference, lengths, 0.1, Sigmoid())
    lost = policy[:, 0] < reference[:, 0]
    assert 10 < lost.sum() < 54
    assert torch.equal(losses[~lost], plain[~lost])
    assert torch.equal(in_policy[~lost], in_plain[~lost])
    assert (losses > plain)[lost].all()


@pytest.mark.parametrize("loss", CASES)
def test_a_policy_equal_to_its_reference_has_the_loss_of_margin_zero_and_no_rewards(loss):
    policy, _, lengths = random_pairs()
    losses, rewards, *_ = loss_and_gradients(policy, policy, lengths, 0.1, CASES[loss])
    nll = -SFT_WEIGHT * policy[:, 0] / lengths[:, 0]
    expected = {"ipo": 25.0, "ipo, averaged": 25.0, "hinge": 1.0, "rpo": np.log(2) + nll}.get(loss, np.log(2))
    torch.testing.assert_close(losses, torch.zeros(64) + expected, rtol=1e-6, atol=1e-6)
    assert rewards.shape == policy.shape
    assert not rewards.any()


@pytest.mark.parametrize("loss", CASES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("nats", [1000.0, -1000.0])
def test_log_ratios_of_a_thousand_nats_stay_finite_and_exact(loss, side, nats):
    policy, reference, lengths = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
    policy[0, side] = nats
    for ours, expected in zip(
        loss_and_gradients(policy, reference, lengths, 1.0, CASES[loss]),
        closed_form(policy, reference, lengths, 1.0, loss),
        strict=True,
    ):
        assert torch.isfinite(ours).all()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("loss", CASES)
def test_gradients_reach_the_policy_and_not_the_reference(loss):
    policy, reference, lengths = random_pairs()
    losses = CASES[loss](PairBatch(policy.requires_grad_(), reference, lengths), 0.1)
    assert losses.shape == (64,)
    losses.sum().backward()
    assert policy.grad.any(0).all()
    assert reference.grad is None


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("shape", [(1, 2), (64, 1), (2, 64), (64,), ()])
def test_shapes_that_would_broadcast_are_refused(position, shape):
    pairs = list(random_pairs())
    pairs[position] = torch.ones(shape)
    with pytest.raises(ValueError, match="one shape"):
        PairBatch(*pairs)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (64, 3), (2, 64), (1, 64, 2), ()])
def test_shapes_that_hold_no_pairs_are_refused(shape):
    with pytest.raises(ValueError, match=r"one shape \[pairs, 2\]"):
        PairBatch(*[torch.ones(shape)] * 3)


@pytest.mark.parametrize("loss", CASES)
def test_rewards_are_those_of_the_loss_for_any_shape(loss):
    policy, reference, lengths = random_pairs()
    rewards = CASES[loss].rewards(policy, reference, lengths, 0.3)
    alone = CASES[loss].rewards(policy[:, 0], reference[:, 0], lengths[:, 0], 0.3)
    assert torch.equal(alone, rewards[:, 0])
    share = lengths if loss in AVERAGED else 1
    torch.testing.assert_close(rewards, 0.3 * (policy - reference) / share)


def test_a_loss_without_reference_has_the_log_probs_of_the_policy_as_log_ratios():
    class NoReference(Sigmoid):
        needs = frozenset()

    policy, reference, lengths = random_pairs()
    losses, rewards, *_ = loss_and_gradients(policy, reference, lengths, 0.3, Sigmoid())
    without = NoReference()
    assert torch.equal(without(PairBatch(policy - reference, reference, lengths), 0.3), losses)
    assert torch.equal(without.rewards(policy - reference, reference, lengths, 0.3), rewards)
