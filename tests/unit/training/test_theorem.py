"""The papers' central claims: the minimum of a loss is the optimum of a KL-constrained maximisation."""

import pytest
import torch

from dpo.training.losses import (
    ApoZero,
    Bco,
    Conservative,
    Exo,
    Hinge,
    Ipo,
    LdDpo,
    Nca,
    PairBatch,
    Robust,
    Sigmoid,
    SppoHard,
    Wpo,
)

PROMPTS, ANSWERS = 3, 6
FIRST, SECOND = torch.triu_indices(ANSWERS, ANSWERS, 1)
PAIRS = torch.stack([torch.cat([FIRST, SECOND]), torch.cat([SECOND, FIRST])], 1)
"""Every pair of answers in both orders, [pairs, 2]."""

NOISE = 0.3


def known_world():
    """(log pi_ref, reward), each [prompts, answers]."""
    generator = torch.Generator().manual_seed(0)
    reference, reward = torch.randn(2, PROMPTS, ANSWERS, generator=generator, dtype=torch.float64)
    return reference.log_softmax(1), reward


def bradley_terry(reward):
    """Probability that the first answer of each pair is preferred, [prompts, pairs]."""
    return torch.sigmoid(reward[:, PAIRS[:, 0]] - reward[:, PAIRS[:, 1]])


def learned_policy(reference, probability, beta, loss=None, agreement=None):
    """A table of logits, fitted to the expected loss: every pair in both orders, weighted by its probability."""
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def expected_loss():
        optimizer.zero_grad()
        sides = [table[:, PAIRS].flatten(0, 1) for table in (logits.log_softmax(1), reference)]
        losses = (loss or Sigmoid())(table_batch(sides, agreement), beta)
        total = (probability.flatten() * losses).sum()
        total.backward()
        return total

    optimizer.step(expected_loss)
    return logits.detach().softmax(1)


def table_batch(sides, agreement=None):
    """Answers of one token each: their log-probs are those of the token."""
    policy, reference = sides
    return PairBatch(
        policy, reference, torch.ones_like(reference, dtype=torch.long), agreement, token_logps=policy.flatten(),
        reference_token_logps=reference.flatten(), collision_logps=torch.zeros_like(reference).flatten(),
    )  # fmt: skip


def optimal_policy(reference, reward, beta):
    """The maximum of E[reward] - beta KL(pi || pi_ref): pi_ref exp(reward / beta), normalised."""
    weights = reference.exp() * torch.exp(reward / beta)
    return weights / weights.sum(1, keepdim=True)


def total_variation(p, q):
    return (p - q).abs().sum(1).max().item() / 2


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_learned_policy_is_the_closed_form_optimum(beta):
    reference, reward = known_world()
    optimum = optimal_policy(reference, reward, beta)
    assert total_variation(reference.exp(), optimum) > 0.05
    assert total_variation(learned_policy(reference, bradley_terry(reward), beta), optimum) < 1e-4


@pytest.mark.parametrize("rounds", [2, 4])
def test_rounds_with_a_moving_reference_are_one_round_with_a_smaller_beta(rounds):
    reference, reward = known_world()
    policy = reference
    for _ in range(rounds):
        policy = learned_policy(policy, bradley_terry(reward), 2.0).log()
    at_once = learned_policy(reference, bradley_terry(reward), 2.0 / rounds)
    assert total_variation(policy.exp(), at_once) < 1e-4
    fixed = learned_policy(reference, bradley_terry(reward), 2.0)
    assert total_variation(policy.exp(), fixed) > 0.05


def test_adding_a_function_of_the_prompt_to_the_reward_changes_nothing():
    reference, reward = known_world()
    shifted = reward + torch.tensor([[-7.0], [0.5], [30.0]], dtype=torch.float64)
    same = learned_policy(reference, bradley_terry(reward), 0.5)
    assert total_variation(learned_policy(reference, bradley_terry(shifted), 0.5), same) < 1e-5


def test_another_reward_gives_another_policy():
    reference, reward = known_world()
    policy = learned_policy(reference, bradley_terry(reward), 0.5)
    assert total_variation(learned_policy(reference, bradley_terry(-reward), 0.5), policy) > 0.5


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_only_robust_finds_the_optimum_if_labels_are_flipped(beta):
    reference, reward = known_world()
    optimum = optimal_policy(reference, reward, beta)
    noisy = (1 - NOISE) * bradley_terry(reward) + NOISE * bradley_terry(-reward)
    assert total_variation(learned_policy(reference, noisy, beta, Robust(label_smoothing=NOISE)), optimum) < 1e-4
    for loss in (Sigmoid(), Conservative(label_smoothing=NOISE)):
        assert total_variation(learned_policy(reference, noisy, beta, loss), optimum) > 0.02


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_robust_by_agreement_finds_the_optimum_if_each_pair_has_its_own_rate_of_flipped_labels(beta):
    reference, reward = known_world()
    rates = 0.4 * torch.rand(PROMPTS, len(FIRST), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rates = rates.repeat(1, 2)  # both orders
    noisy = (1 - rates) * bradley_terry(reward) + rates * bradley_terry(-reward)
    optimum = optimal_policy(reference, reward, beta)
    loss, agreement = Robust(label_smoothing="agreement"), (1 - rates).flatten()
    assert total_variation(learned_policy(reference, noisy, beta, loss, agreement), optimum) < 1e-4
    mean_rate = Robust(label_smoothing=rates.mean().item())
    assert total_variation(learned_policy(reference, noisy, beta, mean_rate), optimum) > 0.01


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_ipo_maximises_the_probability_of_being_preferred(beta):
    # Azar et al. 2023: with the identity for Psi the reward of an answer is its mean win rate over all answers,
    # itself included at one half. The probabilities may be any, also those that no reward explains.
    reference, _ = known_world()
    upper = torch.rand(PROMPTS, len(FIRST), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probability = torch.cat([upper, 1 - upper], 1)
    wins = torch.zeros_like(reference).index_add(1, PAIRS[:, 0], probability)
    optimum = optimal_policy(reference, (wins + 0.5) / ANSWERS, beta)
    assert total_variation(reference.exp(), optimum) > 0.05
    assert total_variation(learned_policy(reference, probability, beta, Ipo()), optimum) < 1e-6


@pytest.mark.parametrize("loss", [Sigmoid(), LdDpo(alpha=0.3), Wpo()], ids=lambda loss: loss.name)
def test_losses_that_are_stationary_at_the_optimum_of_dpo(loss):
    # Answers have one token, so LD-DPO has no excess; the weights of WPO are the same for both orders of a pair.
    reference, reward = known_world()
    optimum = optimal_policy(reference, reward, 1.0)
    for policy, stationary in ((optimum, True), (reference.exp(), False)):
        logits = policy.log().requires_grad_()
        sides = [table[:, PAIRS].flatten(0, 1) for table in (logits.log_softmax(1), reference)]
        (bradley_terry(reward).flatten() * loss(table_batch(sides), 1.0)).sum().backward()
        assert (logits.grad.abs().max() < 1e-12) == stationary


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_label_smoothing_by_agreement_finds_the_optimum_from_one_label_per_pair(beta):
    # Each pair occurs in one order only. Without its agreement, DPO has no minimum.
    reference, reward = known_world()
    agreement = bradley_terry(reward)[:, : len(FIRST)].flatten()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        sides = [t[:, PAIRS[: len(FIRST)]].flatten(0, 1) for t in (logits.log_softmax(1), reference)]
        total = Conservative(label_smoothing="agreement")(table_batch(sides, agreement), beta).sum()
        total.backward()
        return total

    optimizer.step(loss)
    assert total_variation(logits.detach().softmax(1), optimal_policy(reference, reward, beta)) < 1e-4


@pytest.mark.parametrize("loss", [Hinge(), Exo(), ApoZero(), Nca(), Bco(), SppoHard()], ids=lambda loss: loss.name)
def test_losses_with_another_optimum(loss):
    reference, reward = known_world()
    policy = learned_policy(reference, bradley_terry(reward), 1.0, loss)
    assert total_variation(policy, optimal_policy(reference, reward, 1.0)) > 0.02


def test_sppo_multiplies_each_answer_by_the_exponential_of_its_win_rate():
    # Wu et al. 2024, eq. 4.4 to 4.7: log pi / pi_ref is (win rate - 1/2) / beta up to the normalisation, for pairs
    # of answers of the reference. All answers are equally likely, and a large beta keeps the policy close to it.
    reference, reward = known_world()
    uniform = torch.full_like(reference, 1 / ANSWERS).log()
    probability = bradley_terry(reward)
    ratios = learned_policy(uniform, probability, 50.0, SppoHard()).log() - uniform
    wins = torch.zeros_like(reference).index_add(1, PAIRS[:, 0], probability) / (ANSWERS - 1)
    torch.testing.assert_close(ratios, (wins - wins.mean(1, keepdim=True)) / 50, rtol=0, atol=1e-4)
