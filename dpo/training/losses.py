"""Objectives as pure functions of sequence log-probs.

With r(y) = log pi(y|x) - log pi_ref(y|x), h = r(y_w) - r(y_l), s the logistic function and |y| the tokens of y,
the losses of a preference pair are:

- `sigmoid`: -log s(beta h). Rafailov et al. 2023, "Direct Preference Optimization", eq. 7.
- `ipo`: (h - 1 / (2 beta))^2. Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
  Preferences", eq. 17, with beta for tau. Sums over tokens, as in the paper; TRL 1.16 divides each r(y) by |y|.
- `conservative`: -(1 - e) log s(beta h) - e log s(-beta h), e = label_smoothing. Mitchell 2023, "A note on DPO
  with noisy preferences & relationship to IPO", eq. 3.
- `robust`: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e), e = label_smoothing. Chowdhury et al. 2024,
  "Provably Robust DPO". With labels flipped at rate e its expectation is `sigmoid` of the true ones; a single loss
  may be negative.
- `hinge`: max(0, 1 - beta h). Zhao et al. 2023, "SLiC-HF", with log-probs relative to the reference: hinge-norm of
  Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization".
- `length_normalised`: -log s(beta (r(y_w) / |y_w| - r(y_l) / |y_l|)). Lambert et al. 2024, "Tulu 3", eq. 6.
- `rpo`: -log s(beta h) - sft_weight log pi(y_w|x) / |y_w|. Pang et al. 2024, "Iterative Reasoning Preference
  Optimization", eq. 1 (third version). Each pair has its own mean; TRL 1.16 takes one over all tokens of a batch.
- `dpop`: -log s(beta (h - penalty max(0, -r(y_w)))). Pal et al. 2024, "Smaug", eq. 3 (second version, which
  mends the brackets of the first).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.training.settings import LossName, LossSettings


def implicit_rewards(policy: Tensor, reference: Tensor, lengths: Tensor, beta: float, loss: LossName) -> Tensor:
    """Return the implicit rewards of completions: beta r(y), and beta r(y) / |y| for `length_normalised`.

    Eq. 5 of Rafailov et al. 2023, up to beta log Z(x), which cancels between the completions of one prompt.

    Args:
        policy: log pi(y|x), summed over completion tokens, in nats, any shape.
        reference: log pi_ref(y|x), same shape.
        lengths: tokens of each completion, at least 1, same shape.
        beta: strength of the KL constraint.
        loss: the loss that the policy is trained with.
    """
    ratios = policy - reference
    return beta * (ratios / lengths if loss == "length_normalised" else ratios)


def preference_loss(
    policy: Tensor, reference: Tensor, lengths: Tensor, beta: float, loss: LossName, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Loss and implicit rewards of a batch of preference pairs; the equations head this module.

    The rewards are those of `implicit_rewards`.

    Args:
        policy: log pi(y|x) of chosen and rejected, summed over completion tokens, in nats, shape [pairs, 2].
        reference: log pi_ref(y|x), shape [pairs, 2].
        lengths: tokens of each completion, at least 1, shape [pairs, 2].
        beta: strength of the pull to the reference; positive.
        loss: which objective.
        settings: of every loss; only those of `loss` are used.

    Returns:
        (losses [pairs], rewards [pairs, 2]). Rewards are detached.

    Raises:
        ValueError: beta is not positive, or the shapes differ (broadcasting would mix pairs up).
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    shapes = [tuple(t.shape) for t in (policy, reference, lengths)]
    if shapes != [(policy.numel() // 2, 2)] * 3:
        raise ValueError(f"policy, reference and lengths must have one shape [pairs, 2], got {shapes}")
    ratios = policy - reference
    if loss == "length_normalised":
        ratios = ratios / lengths
    h = ratios[:, 0] - ratios[:, 1]
    match loss:
        case "sigmoid" | "length_normalised":
            losses = -F.logsigmoid(beta * h)
        case "ipo":
            losses = (h - 1 / (2 * beta)) ** 2
        case "conservative":
            flipped = settings.conservative.label_smoothing
            losses = -(1 - flipped) * F.logsigmoid(beta * h) - flipped * F.logsigmoid(-beta * h)
        case "robust":
            flipped = settings.robust.label_smoothing
            losses = -(1 - flipped) * F.logsigmoid(beta * h) + flipped * F.logsigmoid(-beta * h)
            losses = losses / (1 - 2 * flipped)
        case "hinge":
            losses = F.relu(1 - beta * h)
        case "rpo":
            losses = -F.logsigmoid(beta * h) - settings.rpo.sft_weight * policy[:, 0] / lengths[:, 0]
        case "dpop":
            losses = -F.logsigmoid(beta * (h - settings.dpop.penalty * F.relu(-ratios[:, 0])))
    return losses, implicit_rewards(policy, reference, lengths, beta, loss).detach()


def nll_loss(completion_logps: Tensor) -> Tensor:
    """Negative log-likelihood of completions, the objective of supervised fine-tuning.

    Args:
        completion_logps: log pi(y|x) summed over completion tokens, any shape.

    Returns:
        The sum over all completions, a scalar in nats; the caller divides by the number of tokens.
    """
    return torch.neg(completion_logps.sum())
