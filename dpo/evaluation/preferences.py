"""What held-out preference pairs say of a policy."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from dpo.losses import dpo_loss


def mean_interval(values: Sequence[float], seed: int) -> list[float]:
    """95% percentile-bootstrap interval [low, high] of the mean; constant values are their own interval."""
    data = np.asarray(values, dtype=float)
    if np.ptp(data) == 0:
        return [float(data[0])] * 2
    found = bootstrap((data,), np.mean, method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return [float(found.low), float(found.high)]


def preference_metrics(
    policy: Tensor, reference: Tensor, beta: float, seed: int
) -> dict[str, float | list[float]]:
    """Implicit reward accuracy, margin, rewards and loss on preference pairs.

    Args:
        policy: log pi(y|x) of (chosen, rejected), shape [pairs, 2], nats.
        reference: the same of the reference policy.
        beta: the beta that the policy was trained with; scales rewards (Rafailov et al. 2023, eq. 5).
        seed: of the bootstrap.

    Returns:
        Means over pairs; `*_ci` are 95% intervals. A margin of exactly 0 counts half in the accuracy.
    """
    losses, chosen, rejected = dpo_loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta)
    margins = chosen - rejected
    correct = (margins > 0).double() + (margins == 0).double() / 2
    displaced = (policy - reference)[:, 0]
    return {
        "pairs": len(margins),
        "reward_accuracy": correct.mean().item(),
        "reward_accuracy_ci": mean_interval(correct.tolist(), seed),
        "margin": margins.mean().item(),
        "margin_ci": mean_interval(margins.tolist(), seed),
        "chosen_reward": chosen.mean().item(),
        "rejected_reward": rejected.mean().item(),
        "loss": losses.mean().item(),
        "chosen_logp_change": displaced.mean().item(),
        "chosen_logp_fell_share": (displaced < 0).double().mean().item(),
    }


def sample_metrics(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Sequence[int], seed: int
) -> dict[str, float | list[float]]:
    """KL(pi || pi_ref) by Monte Carlo on the policy's own samples.

    Args:
        policy_logps: log pi(y|x) of S samples y ~ pi, shape [S], nats.
        reference_logps: log pi_ref(y|x) of the same samples, shape [S].
        lengths: tokens in each sample.
        seed: of the bootstrap.
    """
    ratios = (policy_logps - reference_logps).double()
    return {
        "kl": ratios.mean().item(),
        "kl_ci": mean_interval(ratios.tolist(), seed),
        "kl_per_token": (ratios.sum() / torch.tensor(lengths).sum()).item(),
        "sample_tokens": float(np.mean(lengths)),
    }


def judged_metrics(
    policy: Sequence[float], reference: Sequence[float], seed: int
) -> dict[str, float | list[float]]:
    """Win rate and reward of policy answers against reference answers to the same prompts, ties half.

    Args:
        policy: judge's scores of S policy answers, higher is better.
        reference: scores of the reference's answers to the same prompts.
        seed: of the bootstrap.
    """
    difference = np.subtract(policy, reference)
    wins = (difference > 0) + (difference == 0) / 2
    return {
        "win_rate": float(wins.mean()),
        "win_rate_ci": mean_interval(wins.tolist(), seed),
        "tie_rate": float((difference == 0).mean()),
        "reward": float(np.mean(policy)),
        "reward_ci": mean_interval(policy, seed),
        "reference_reward": float(np.mean(reference)),
    }
