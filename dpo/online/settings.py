"""Settings of training on pairs of the policy's own responses."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dpo.common.settings import Positive, Rate, Settings


@dataclass(frozen=True, kw_only=True)
class RewardTrainingSettings(Settings):
    """Training of the reward models of `sweep.reward_models` on the training pairs, with TRL."""

    epochs: Positive = 1
    """Passes over the training pairs."""
    pairs_per_step: Positive = 16
    """Effective batch size, in pairs."""
    learning_rate: Rate = 2e-5
    """Peak learning rate."""
    centre: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the mean of (r_chosen + r_rejected)^2 in the loss, which keeps scores near 0 (Eisenstein et al.
    2023, eq. 2). Differences of scores do not depend on their offset."""


@dataclass(frozen=True, kw_only=True)
class OnlineSettings(Settings):
    """Training on the policy's own responses, which `feedback` scores (`sweep.rounds`, `sweep.rloo`)."""

    prompts: Positive | None = 160
    """Number of training prompts in all rounds together, drawn at random; null uses all."""
    answers: Annotated[int, Field(ge=2)] = 4
    """Responses per prompt. The best and the worst finished one are a pair, unless their scores are equal."""
    reference: Literal["fixed", "moving"] = "fixed"
    """Policy of the reference log-probs: the reference, or the policy at the start of the round. R rounds with a
    moving reference at beta have the optimum of one round at beta / R."""
    advantage: Literal["leave_one_out", "group"] = "leave_one_out"
    """RLOO: the reward minus the mean reward of the other responses to the prompt (Ahmadian et al. 2024). `group`:
    minus the mean of all, and divided by their standard deviation, as in GRPO (Shao et al. 2024)."""
    clip: Rate = 0.2
    """RLOO: maximum change of a response's probability in a round that the loss rewards, as a share (epsilon of
    PPO). It has an effect if a round has several steps."""
