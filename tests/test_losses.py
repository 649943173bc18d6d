"""The DPO loss against a float64 closed form, TRL and the paper's theorem."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit
from trl import DPOTrainer

from dpo.losses import dpo_loss, nll_loss


def random_logps(pairs=64, seed=0):
    """Policy and reference log-probs, four tensors [pairs], the policy up to some 20 nats off the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = -torch.rand(2, pairs, generator=generator) * 200
    policy = reference + torch.randn(2, pairs, generator=generator) * 10
    return policy[0], policy[1], reference[0], reference[1]


def loss_and_gradients(logps, beta):
    leaves = [t.clone().requires_grad_() for t in logps]
    losses, chosen, rejected = dpo_loss(*leaves, beta)
    gradients = torch.autograd.grad(losses.sum(), leaves)
    return losses.detach(), chosen, rejected, gradients


def test_by_hand():
    # chosen reward   0.5 * (-10 - -12) =  1.0
    # rejected reward 0.5 * ( -9 -  -8) = -0.5
    # loss -log sigmoid(1.0 - -0.5) = log(1 + e^-1.5) = 0.2014132780
    # gradient in log pi(y_w|x): -beta * sigmoid(-1.5) = -0.5 * 0.1824255238 = -0.0912127619, eq. 7's weight
    logps = [torch.tensor([value], dtype=torch.float64) for value in (-10.0, -9.0, -12.0, -8.0)]
    losses, chosen, rejected, gradients = loss_and_gradients(logps, 0.5)
    assert (chosen.item(), rejected.item()) == (1.0, -0.5)
    assert losses.item() == pytest.approx(0.2014132780, abs=1e-10)
    expected = [-0.0912127619, 0.0912127619, 0.0912127619, -0.0912127619]
    assert [g.item() for g in gradients] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_rewards_and_gradients_equal_the_closed_form_in_float64(beta, dtype):
    logps = [t.to(dtype) for t in random_logps()]
    losses, chosen, rejected, gradients = loss_and_gradients(logps, beta)
    pi_w, pi_l, ref_w, ref_l = (t.double().numpy() for t in logps)
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    slope = beta * expit(-margin)
    close = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(losses, np.logaddexp(0, -margin), **close)
    np.testing.assert_allclose(chosen, beta * (pi_w - ref_w), **close)
    np.testing.assert_allclose(rejected, beta * (pi_l - ref_l), **close)
    for gradient, expected in zip(gradients, (-slope, slope, slope, -slope), strict=True):
        np.testing.assert_allclose(gradient, expected, **close)


def trl_loss(logps, beta):
    """Mean loss and logged rewards of TRL's DPOTrainer when a model gives these log-probs to one-token answers."""
    pi_w, pi_l, ref_w, ref_l = logps
    count = 2 * len(pi_w)
    outputs = SimpleNamespace(
        log_probs=torch.cat([pi_w, pi_l])[:, None],
        entropy=torch.zeros(count, 1),
        mean_logits=torch.zeros(count, 1),
        is_top1=torch.zeros(count, 1, dtype=torch.bool),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(count, 2, dtype=torch.long),
        "attention_mask": torch.ones(count, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * count),
        "ref_chosen_logps": ref_w,
        "ref_rejected_logps": ref_l,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
def test_loss_and_gradients_equal_those_of_trl(beta):
    logps = random_logps(seed=1)
    losses, chosen, rejected, gradients = loss_and_gradients(logps, beta)
    leaves = [t.clone().requires_grad_() for t in logps]
    expected, metrics = trl_loss(leaves, beta)
    torch.testing.assert_close(losses.mean(), expected.detach(), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected * len(losses), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-6)
    assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-6)


def test_an_untouched_policy_has_loss_log_2_and_margin_zero():
    policy_chosen, policy_rejected, *_ = random_logps()
    losses, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, policy_chosen, policy_rejected, 0.1)
    torch.testing.assert_close(losses, torch.full_like(losses, np.log(2)), rtol=0, atol=1e-7)
    assert not chosen.any()
    assert not rejected.any()


@pytest.mark.parametrize("sign", [1, -1])
def test_margins_of_a_thousand_stay_finite(sign):
    logps = [torch.tensor([value]) for value in (sign * 1000.0, 0.0, 0.0, 0.0)]
    losses, _, _, gradients = loss_and_gradients(logps, 1.0)
    assert losses.item() == (0.0 if sign == 1 else 1000.0)
    assert gradients[0].item() == (0.0 if sign == 1 else -1.0)


def test_rewards_carry_no_gradient():
    leaves = [t.requires_grad_() for t in random_logps()]
    losses, chosen, rejected = dpo_loss(*leaves, 0.1)
    assert losses.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo_loss(*random_logps(), beta)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("shape", [(1,), (64, 1), ()])
def test_shapes_that_would_broadcast_are_refused(position, shape):
    logps = list(random_logps())
    logps[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match="one shape"):
        dpo_loss(*logps, 0.1)


def test_nll_is_the_negative_sum():
    logps = torch.tensor([[-1.5, -2.0], [-0.25, -4.0]], requires_grad=True)
    loss = nll_loss(logps)
    assert loss.item() == 7.75
    loss.backward()
    assert torch.equal(logps.grad, torch.full((2, 2), -1.0))
