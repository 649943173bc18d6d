"""The DPO objective as a pure function of four tensors of sequence log-probs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and implicit rewards of a batch of preference pairs.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7 (loss) and eq. 5 (reward up to
    beta log Z(x), which cancels between the two completions of one prompt).

    Args:
        policy_chosen_logps: log pi(y_w|x), summed over completion tokens, in nats, shape [pairs].
        policy_rejected_logps: log pi(y_l|x), shape [pairs].
        reference_chosen_logps: log pi_ref(y_w|x), shape [pairs].
        reference_rejected_logps: log pi_ref(y_l|x), shape [pairs].
        beta: strength of the KL constraint; positive.

    Returns:
        (losses [pairs], chosen_rewards [pairs], rejected_rewards [pairs]). Rewards are detached.

    Raises:
        ValueError: beta is not positive, or the shapes differ (broadcasting would mix pairs up).
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    shapes = {
        tuple(t.shape)
        for t in (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    }
    if len(shapes) != 1:
        raise ValueError(f"the four log-prob tensors must have one shape, got {sorted(shapes)}")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def nll_loss(completion_logps: Tensor) -> Tensor:
    """Negative log-likelihood of completions, the objective of supervised fine-tuning.

    Args:
        completion_logps: log pi(y|x) summed over completion tokens, any shape.

    Returns:
        The sum over all completions, a scalar in nats; the caller divides by the number of tokens.
    """
    return torch.neg(completion_logps.sum())
