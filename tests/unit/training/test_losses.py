"""The preference losses against float64 closed forms, TRL and the identities that their papers state."""

from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from trl import DPOTrainer

from dpo.training.losses import implicit_rewards, nll_loss, preference_loss
from dpo.training.settings import LossName, LossSettings, PenalisedLoss, PlainLoss, RegularisedLoss, SmoothedLoss

LOSSES = get_args(LossName)
BETAS = [0.01, 0.1, 0.5, 2.0]
CONSERVATIVE, ROBUST, SFT_WEIGHT, PENALTY = 0.1, 0.2, 0.4, 4.0


def settings(conservative=CONSERVATIVE, robust=ROBUST):
    return LossSettings(
        sigmoid=PlainLoss(),
        ipo=PlainLoss(),
        conservative=SmoothedLoss(label_smoothing=conservative),
        robust=SmoothedLoss(label_smoothing=robust),
        hinge=PlainLoss(),
        length_normalised=PlainLoss(),
        rpo=RegularisedLoss(sft_weight=SFT_WEIGHT),
        dpop=PenalisedLoss(penalty=PENALTY),
    )


def random_pairs(pairs=64, seed=0, dtype=torch.float32):
    """Log-probs and lengths [pairs, 2]; the policy is up to some 20 nats off the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = -torch.rand(pairs, 2, generator=generator) * 200
    policy = reference + torch.randn(pairs, 2, generator=generator) * 10
    lengths = torch.randint(1, 9, (pairs, 2), generator=generator)
    return policy.to(dtype), reference.to(dtype), lengths


def loss_and_gradients(policy, reference, lengths, beta, loss, params=None):
    """Losses, rewards and the gradients of the summed losses in policy and reference."""
    leaves = [policy.clone().requires_grad_(), reference.clone().requires_grad_()]
    losses, rewards = preference_loss(*leaves, lengths, beta, loss, params or settings())
    return losses.detach(), rewards, *torch.autograd.grad(losses.sum(), leaves)


def closed_form(policy, reference, lengths, beta, loss):
    """The same in float64, gradients by hand; -log sigmoid(z) = softplus(-z), softplus(z) = softplus(-z) + z."""
    policy, reference, lengths = (t.double().numpy() for t in (policy, reference, lengths))
    ratios = policy - reference
    weights = 1 / lengths if loss == "length_normalised" else np.ones_like(lengths)
    if loss == "dpop":
        weights[:, 0] += PENALTY * (ratios[:, 0] < 0)
    z = beta * (weights[:, 0] * ratios[:, 0] - weights[:, 1] * ratios[:, 1])
    losses, slope = np.logaddexp(0, -z), -expit(-z)
    if loss == "ipo":
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
    rewards = beta * ratios / (lengths if loss == "length_normalised" else 1)
    return losses, rewards, in_policy, -gradient


BY_HAND = {
    "sigmoid": (0.2014132780, 1.5019290813),  # log(1 + e^-1.5), log(1 + e^1.25)
    "ipo": (4.0, 12.25),  # (3 - 1)^2, (-2.5 - 1)^2
    "conservative": (0.3514132780, 1.3769290813),  # sigmoid + 0.1 * 1.5, sigmoid - 0.1 * 1.25
    "robust": (-0.2985867220, 1.9185957480),  # sigmoid - 0.2 / 0.6 * 1.5, sigmoid + 0.2 / 0.6 * 1.25
    "hinge": (0.0, 2.25),  # 1 - 1.5 is below 0, 1 + 1.25
    "length_normalised": (0.4740769842, 0.8981232641),  # 0.5 * (2/4 + 1/2) = 0.5, 0.5 * (-2/8 - 0.5/1) = -0.375
    "rpo": (1.2014132780, 2.2019290813),  # sigmoid + 0.4 * 10/4, sigmoid + 0.4 * 14/8
    "dpop": (0.2014132780, 5.2552337982),  # chosen gained; chosen lost 2: log(1 + e^(0.5 * (2.5 + 4 * 2)))
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_by_hand(loss):
    # Log-ratios (2, -1) and (-2, 0.5): h = 3 and -2.5, with beta 0.5 margins of 1.5 and -1.25.
    policy = torch.tensor([[-10.0, -9.0], [-14.0, -7.5]], dtype=torch.float64)
    reference = torch.tensor([[-12.0, -8.0], [-12.0, -8.0]], dtype=torch.float64)
    lengths = torch.tensor([[4, 2], [8, 1]])
    losses, rewards = preference_loss(policy, reference, lengths, 0.5, loss, settings())
    assert losses.tolist() == pytest.approx(BY_HAND[loss], abs=1e-10)
    plain, normalised = [[1.0, -0.5], [-1.0, 0.25]], [[0.25, -0.25], [-0.125, 0.25]]
    assert rewards.tolist() == (normalised if loss == "length_normalised" else plain)


def test_the_gradient_by_hand_is_that_of_eq_7():
    # -beta * sigmoid(-1.5) = -0.5 * 0.1824255238
    policy, reference = torch.tensor([[-10.0, -9.0]]).double(), torch.tensor([[-12.0, -8.0]]).double()
    _, _, in_policy, in_reference = loss_and_gradients(policy, reference, torch.ones(1, 2), 0.5, "sigmoid")
    assert in_policy[0].tolist() == pytest.approx([-0.0912127619, 0.0912127619], abs=1e-10)
    assert in_reference[0].tolist() == pytest.approx([0.0912127619, -0.0912127619], abs=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_rewards_and_gradients_equal_the_closed_form_in_float64(loss, beta, dtype):
    pairs = random_pairs(dtype=dtype)
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for ours, expected in zip(
        loss_and_gradients(*pairs, beta, loss), closed_form(*pairs, beta, loss), strict=True
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected, **close)


TRL = {
    "sigmoid": {"sigmoid": 1.0},
    "ipo": {"ipo": 1.0},
    "conservative": {"aot": 1.0},  # sorts the pairs of a batch, of which there is one, and smooths labels
    "robust": {"robust": 1.0},
    "hinge": {"hinge": 1.0},
    "length_normalised": {"sigmoid_norm": 1.0},
    "rpo": {"sigmoid": 1.0, "sft": SFT_WEIGHT},
}
"""What each loss is made of in TRL, which has no DPOP."""


def trl_loss(policy, reference, lengths, beta, loss):
    """Loss and logged rewards of TRL's DPOTrainer for one pair, its log-probs spread evenly over its tokens."""
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    outputs = SimpleNamespace(
        log_probs=(policy / lengths)[:, None] * mask,
        entropy=torch.zeros(2, width),
        mean_logits=torch.zeros(2, width),
        is_top1=torch.zeros(2, width, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(TRL[loss]),
        loss_weights=list(TRL[loss].values()),
        label_smoothing={"conservative": CONSERVATIVE, "robust": ROBUST}.get(loss, 0.0),
        beta=beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    prompt = torch.zeros(2, 1, dtype=torch.bool)
    inputs = {
        "input_ids": torch.ones(2, 1 + width, dtype=torch.long),
        "attention_mask": torch.cat([~prompt, mask], 1).long(),
        "completion_mask": torch.cat([prompt, mask], 1).long(),
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    value = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    metrics = trainer._metrics["train"]
    return value, [metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]]


def trl_loss_and_gradients(policy, reference, lengths, beta, loss):
    leaves = [policy.clone().requires_grad_(), reference.clone().requires_grad_()]
    values, rewards = zip(
        *(trl_loss(*pair, beta, loss) for pair in zip(*leaves, lengths, strict=True)), strict=True
    )
    losses = torch.stack(values)
    return losses.detach(), torch.tensor(rewards), *torch.autograd.grad(losses.sum(), leaves)


@pytest.mark.parametrize("loss", [loss for loss in TRL if loss != "ipo"])
@pytest.mark.parametrize("beta", BETAS)
def test_losses_rewards_and_gradients_equal_those_of_trl(loss, beta):
    policy, reference, lengths = random_pairs(pairs=16, seed=1)
    losses, rewards, *gradients = loss_and_gradients(policy, reference, lengths, beta, loss)
    expected, trl_rewards, *trl_gradients = trl_loss_and_gradients(policy, reference, lengths, beta, loss)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, trl_gradients, rtol=1e-5, atol=1e-5)
    if loss == "length_normalised":  # TRL divides by the length in the loss alone
        rewards = rewards * lengths
    torch.testing.assert_close(rewards, trl_rewards, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_of_means_over_tokens_equals_the_ipo_of_trl(beta):
    policy, reference, lengths = random_pairs(pairs=16, seed=1)
    losses, _, *gradients = loss_and_gradients(policy / lengths, reference / lengths, lengths, beta, "ipo")
    expected, _, *trl_gradients = trl_loss_and_gradients(policy, reference, lengths, beta, "ipo")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, trl_gradients, strict=True):
        torch.testing.assert_close(ours / lengths, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_length_normalised_and_rpo_look_at_lengths(loss):
    policy, reference, lengths = random_pairs()
    losses, rewards = preference_loss(policy, reference, lengths, 0.1, loss, settings())
    others, other_rewards = preference_loss(policy, reference, lengths + 1, 0.1, loss, settings())
    assert torch.equal(losses, others) == (loss not in ("length_normalised", "rpo"))
    assert torch.equal(rewards, other_rewards) == (loss != "length_normalised")


@pytest.mark.parametrize("loss", ["conservative", "robust"])
def test_without_label_smoothing_it_is_the_sigmoid_loss(loss):
    pairs = random_pairs()
    plain = loss_and_gradients(*pairs, 0.1, "sigmoid")
    for ours, expected in zip(
        loss_and_gradients(*pairs, 0.1, loss, settings(conservative=0.0, robust=0.0)), plain, strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.49])
def test_the_mean_of_the_robust_loss_over_flipped_labels_is_the_sigmoid_loss(rate):
    pairs = random_pairs(dtype=torch.float64)
    as_labelled = loss_and_gradients(*pairs, 0.1, "robust", settings(robust=rate))
    flipped = loss_and_gradients(*(t.flip(1) for t in pairs), 0.1, "robust", settings(robust=rate))
    clean = loss_and_gradients(*pairs, 0.1, "sigmoid")
    for kept, swapped, expected in zip(as_labelled[2:], flipped[2:], clean[2:], strict=True):
        torch.testing.assert_close((1 - rate) * kept + rate * swapped.flip(1), expected, rtol=1e-10, atol=1e-12)
    mean = (1 - rate) * as_labelled[0] + rate * flipped[0]
    torch.testing.assert_close(mean, clean[0], rtol=1e-10, atol=1e-12)


def margins(h):
    """Log-probs of pairs whose log-ratios differ by h, all of it the gain of chosen, and lengths of one token."""
    reference = torch.full((len(h), 2), -3.0, dtype=torch.float64)
    return torch.stack([reference[:, 0] + h, reference[:, 1]], 1), reference, torch.ones(len(h), 2)


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_is_least_where_h_is_half_the_inverse_of_beta(beta):
    h = 1 / (2 * beta) + torch.tensor([0.0, -0.1, 0.1, -5.0, 5.0], dtype=torch.float64)
    losses, _, in_policy, _ = loss_and_gradients(*margins(h), beta, "ipo")
    assert losses.tolist() == pytest.approx([0, 0.01, 0.01, 25, 25], abs=1e-10)
    assert in_policy[:, 0].tolist() == pytest.approx([0, -0.2, 0.2, -10, 10], abs=1e-10)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_conservative_is_least_where_the_preference_is_as_sure_as_the_labels(rate):
    best = logit(1 - rate) / 0.1
    h = best + torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)
    losses, _, in_policy, _ = loss_and_gradients(*margins(h), 0.1, "conservative", settings(conservative=rate))
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert losses[0].item() == pytest.approx(entropy, rel=1e-12)
    assert in_policy[0, 0].item() == pytest.approx(0, abs=1e-15)
    assert in_policy[1, 0] < 0 < in_policy[2, 0]


def test_hinge_stops_at_a_margin_of_one():
    h = torch.tensor([5.0, 9.999, 10.001, 50.0], dtype=torch.float64)
    losses, _, in_policy, _ = loss_and_gradients(*margins(h), 0.1, "hinge")
    assert losses.tolist() == pytest.approx([0.5, 0.0001, 0, 0], abs=1e-12)
    assert in_policy[:, 0].tolist() == [-0.1, -0.1, 0, 0]


def test_dpop_is_the_sigmoid_loss_until_chosen_loses():
    policy, reference, lengths = random_pairs()
    policy[0] = reference[0]  # where training starts
    losses, _, in_policy, _ = loss_and_gradients(policy, reference, lengths, 0.1, "dpop")
    plain, _, in_plain, _ = loss_and_gradients(policy, reference, lengths, 0.1, "sigmoid")
    lost = policy[:, 0] < reference[:, 0]
    assert 10 < lost.sum() < 54
    assert torch.equal(losses[~lost], plain[~lost])
    assert torch.equal(in_policy[~lost], in_plain[~lost])
    assert (losses > plain)[lost].all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_untouched_policy_has_the_loss_of_margin_zero_and_no_rewards(loss):
    policy, _, lengths = random_pairs()
    losses, rewards = preference_loss(policy, policy, lengths, 0.1, loss, settings())
    nll = -SFT_WEIGHT * policy[:, 0] / lengths[:, 0]
    expected = {"ipo": 25.0, "hinge": 1.0, "rpo": np.log(2) + nll}.get(loss, np.log(2))
    torch.testing.assert_close(losses, torch.zeros(64) + expected, rtol=1e-6, atol=1e-6)
    assert rewards.shape == policy.shape
    assert not rewards.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("nats", [1000.0, -1000.0])
def test_log_ratios_of_a_thousand_nats_stay_finite_and_exact(loss, side, nats):
    policy, reference, lengths = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
    policy[0, side] = nats
    for ours, expected in zip(
        loss_and_gradients(policy, reference, lengths, 1.0, loss),
        closed_form(policy, reference, lengths, 1.0, loss),
        strict=True,
    ):
        assert torch.isfinite(ours).all()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_reach_the_policy_and_neither_rewards_nor_an_unasked_reference(loss):
    policy, reference, lengths = random_pairs()
    losses, rewards = preference_loss(policy.requires_grad_(), reference, lengths, 0.1, loss, settings())
    assert losses.shape == (64,)
    assert not rewards.requires_grad
    losses.sum().backward()
    assert policy.grad.any(0).all()
    assert reference.grad is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(loss, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        preference_loss(*random_pairs(), beta, loss, settings())


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("shape", [(1, 2), (64, 1), (2, 64), (64,), ()])
def test_shapes_that_would_broadcast_are_refused(position, shape):
    pairs = list(random_pairs())
    pairs[position] = torch.ones(shape)
    with pytest.raises(ValueError, match="one shape"):
        preference_loss(*pairs, 0.1, "sigmoid", settings())


@pytest.mark.parametrize("shape", [(64,), (64, 1), (64, 3), (2, 64), (1, 64, 2), ()])
def test_shapes_that_hold_no_pairs_are_refused(shape):
    with pytest.raises(ValueError, match=r"one shape \[pairs, 2\]"):
        preference_loss(*[torch.ones(shape)] * 3, 0.1, "sigmoid", settings())


def test_nll_is_the_negative_sum():
    logps = torch.tensor([[-1.5, -2.0], [-0.25, -4.0]], requires_grad=True)
    loss = nll_loss(logps)
    assert loss.item() == 7.75
    loss.backward()
    assert torch.equal(logps.grad, torch.full((2, 2), -1.0))


@pytest.mark.parametrize("loss", LOSSES)
def test_implicit_rewards_are_those_of_the_loss_for_any_shape(loss):
    policy, reference, lengths = random_pairs()
    _, rewards = preference_loss(policy, reference, lengths, 0.3, loss, settings())
    alone = implicit_rewards(policy[:, 0], reference[:, 0], lengths[:, 0], 0.3, loss)
    assert torch.equal(alone, rewards[:, 0])
    share = lengths if loss == "length_normalised" else 1
    torch.testing.assert_close(rewards, 0.3 * (policy - reference) / share)
