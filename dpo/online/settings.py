"""Settings of training on pairs of the policy's own responses."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dpo.common.settings import Positive, Settings


@dataclass(frozen=True, kw_only=True)
class OnlineSettings(Settings):
    """Training on pairs of the policy's own responses, ranked by `feedback`, in the rounds of `sweep.rounds`."""

    prompts: Positive | None = 160
    """Number of training prompts in all rounds together, drawn at random; null uses all."""
    answers: Annotated[int, Field(ge=2)] = 4
    """Responses per prompt. The best and the worst finished one are a pair, unless their scores are equal."""
    reference: Literal["fixed", "moving"] = "fixed"
    """Policy of the reference log-probs: the reference, or the policy at the start of the round. R rounds with a
    moving reference at beta have the optimum of one round at beta / R."""
