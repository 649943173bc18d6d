"""Losses without a reference. Their implicit reward is beta log pi(y|x) / |y|. See `base` for the notation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from dpo.training.losses.base import Loss, PairBatch, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sft(Loss):
    """Negative log-likelihood of chosen per token: -log pi(y_w|x) / |y_w|. It does not depend on beta.

    A part of RPO, ORPO and MPO.
    """

    name: ClassVar[str] = "sft"
    needs = frozenset()

    def _log_ratios(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return policy / lengths

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return -pairs.policy[:, 0] / pairs.lengths[:, 0]


@dataclass(frozen=True, kw_only=True)
class SimPo(Sft):
    """SimPO: -log s(beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l| - g)), g = gamma_beta_ratio.

    Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6, whose gamma is
    beta g.
    """

    name: ClassVar[str] = "simpo"
    gamma_beta_ratio: Annotated[float, Field(ge=0)] = 0.5
    """Target margin of the mean log-probs per token, in nats."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return -log_sigmoid(beta * (self._h(pairs) - self.gamma_beta_ratio))


@dataclass(frozen=True, kw_only=True)
class Orpo(Sft):
    """ORPO: -log p_w - beta log s(log(p_w / (1 - p_w)) - log(p_l / (1 - p_l))), log p = log pi(y|x) / |y|.

    Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 6 and 7, with beta
    for the paper's lambda. The likelihood is averaged per pair and over completion tokens only.
    """

    name: ClassVar[str] = "orpo"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        # At a probability of exactly 1, the odds and their gradient would be infinite.
        mean = self._log_ratios(pairs.policy, pairs.reference, pairs.lengths).clamp(max=-1e-6)
        odds = mean - _log_one_minus_exp(mean)
        return super()._forward(pairs, beta) - beta * log_sigmoid(odds[:, 0] - odds[:, 1])


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0. Mächler 2012, "Accurately Computing log(1 - exp(-|a|))", eq. 7."""
    near = x > -math.log(2)
    small, large = x.where(near, -1.0), x.where(~near, -1.0)  # a masked branch must have a finite gradient
    return (-small.expm1()).log().where(near, (-large.exp()).log1p())
