"""The paper's central claim: the DPO loss is least at the optimum of KL-constrained reward maximisation."""

import pytest
import torch

from dpo.losses import dpo_loss

PROMPTS, ANSWERS = 3, 6


def known_world():
    """(log pi_ref, reward), each [prompts, answers]."""
    generator = torch.Generator().manual_seed(0)
    reference, reward = torch.randn(2, PROMPTS, ANSWERS, generator=generator, dtype=torch.float64)
    return reference.log_softmax(1), reward


def learned_policy(reference, reward, beta):
    """A table of logits, fitted to the expected loss: every pair in both orders, weighted by Bradley-Terry."""
    first, second = torch.triu_indices(ANSWERS, ANSWERS, 1)
    preferred = torch.cat([first, second])
    dispreferred = torch.cat([second, first])
    probability = torch.sigmoid(reward[:, preferred] - reward[:, dispreferred])
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def expected_loss():
        optimizer.zero_grad()
        policy = logits.log_softmax(1)
        sides = [t[:, side] for t in (policy, reference) for side in (preferred, dispreferred)]
        losses, _, _ = dpo_loss(*sides, beta)
        loss = (probability * losses).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    return logits.detach().softmax(1)


def total_variation(p, q):
    return (p - q).abs().sum(1).max().item() / 2


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_learned_policy_is_the_closed_form_optimum(beta):
    reference, reward = known_world()
    weights = reference.exp() * torch.exp(reward / beta)
    optimum = weights / weights.sum(1, keepdim=True)
    assert total_variation(reference.exp(), optimum) > 0.05
    assert total_variation(learned_policy(reference, reward, beta), optimum) < 0.01


def test_a_term_of_the_prompt_alone_changes_nothing():
    reference, reward = known_world()
    shifted = reward + torch.tensor([[-7.0], [0.5], [30.0]], dtype=torch.float64)
    same = learned_policy(reference, reward, 0.5)
    assert total_variation(learned_policy(reference, shifted, 0.5), same) < 1e-5


def test_another_reward_gives_another_policy():
    reference, reward = known_world()
    policy = learned_policy(reference, reward, 0.5)
    assert total_variation(learned_policy(reference, -reward, 0.5), policy) > 0.5
