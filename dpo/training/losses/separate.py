"""Losses with a term for each completion, which also set its own likelihood. See `base` for the notation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo.common.settings import Rate
from dpo.training.losses.base import Loss, PairBatch, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rpo(Loss):
    """RPO: -log s(beta h) - sft_weight log pi(y_w|x) / |y_w|.

    Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1 (third version). The likelihood is
    averaged per pair; TRL 1.16 averages it over all tokens of a batch.
    """

    name: ClassVar[str] = "rpo"
    sft_weight: Rate = 1.0
    """Weight of the mean negative log-likelihood per token of the chosen completion."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        likelihood = self.sft_weight * pairs.policy[:, 0] / pairs.lengths[:, 0]
        return -log_sigmoid(beta * self._h(pairs)) - likelihood


@dataclass(frozen=True, kw_only=True)
class Dpop(Loss):
    """DPO-Positive: -log s(beta (h - penalty max(0, -r(y_w)))).

    Pal et al. 2024, "Smaug", eq. 3 (second version, which corrects the brackets of the first).
    """

    name: ClassVar[str] = "dpop"
    penalty: Rate = 50.0
    """Weight of the nats by which chosen is less likely than under the reference."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        lost = (pairs.reference - pairs.policy)[:, 0].relu()
        return -log_sigmoid(beta * (self._h(pairs) - self.penalty * lost))


@dataclass(frozen=True, kw_only=True)
class ApoZero(Loss):
    """APO-zero: s(-beta r(y_w)) + s(beta r(y_l)): chosen becomes more likely, rejected less.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", eq. 7. For chosen
    completions that are better than the model's own.
    """

    name: ClassVar[str] = "apo_zero"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        chosen, rejected = self._rewards(pairs, beta)
        return (-chosen).sigmoid() + rejected.sigmoid()


@dataclass(frozen=True, kw_only=True)
class ApoDown(Loss):
    """APO-down: s(beta r(y_w)) + s(-beta h): both become less likely, rejected more so.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", eq. 8. For chosen
    completions that are worse than the model's own.
    """

    name: ClassVar[str] = "apo_down"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        chosen, rejected = self._rewards(pairs, beta)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Nca(Loss):
    """NCA for pairs: -log s(beta r(y_w)) - (log s(-beta r(y_w)) + log s(-beta r(y_l))) / 2.

    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards", as in the authors'
    code for pairs.
    """

    name: ClassVar[str] = "nca"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        chosen, rejected = self._rewards(pairs, beta)
        return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


@dataclass(frozen=True, kw_only=True)
class SppoHard(Loss):
    """SPPO with hard labels: (r(y_w) - 1 / (2 beta))^2 + (r(y_l) + 1 / (2 beta))^2, beta = 1 / eta.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", eq. 4.7, with win
    probabilities of 1 and 0.
    """

    name: ClassVar[str] = "sppo_hard"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        ratios = self._log_ratios(pairs.policy, pairs.reference, pairs.lengths)
        return (ratios[:, 0] - 1 / (2 * beta)) ** 2 + (ratios[:, 1] + 1 / (2 * beta)) ** 2


@dataclass(frozen=True, kw_only=True)
class Bco(Loss):
    """BCO for pairs: -log s(beta r(y_w)) - log s(-beta r(y_l)).

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", with a reward shift of
    0, as `bco_pair` in TRL 1.16. A part of MPO.
    """

    name: ClassVar[str] = "bco"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        chosen, rejected = self._rewards(pairs, beta)
        return -log_sigmoid(chosen) - log_sigmoid(-rejected)
