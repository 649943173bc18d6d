"""Preference losses. Each class holds the equation, its source, its settings and its code.

Notation: y_w is the chosen and y_l the rejected completion of a prompt x, r(y) = log pi(y|x) - log pi_ref(y|x),
h = r(y_w) - r(y_l), s is the logistic function and |y| the number of tokens of y.

This module imports torch on first use, because every command reads the settings of the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dpo.common.settings import Rate, Settings

if TYPE_CHECKING:
    from torch import Tensor

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


@dataclass(frozen=True)
class PairBatch:
    """P preference pairs, chosen first.

    Raises:
        ValueError: the shapes differ. Broadcasting would mix pairs.
    """

    policy: Tensor
    """log pi(y|x), summed over completion tokens, in nats, shape [P, 2]."""
    reference: Tensor
    """log pi_ref(y|x), shape [P, 2]."""
    lengths: Tensor
    """Number of tokens of each completion, at least 1, shape [P, 2]."""
    token_logps: Tensor | None = None
    """Log-probs of the policy for all completion tokens, in order, shape [N], if the loss needs them."""
    statistics: Mapping[str, Tensor] | None = None
    """Result of `Loss.statistics` for the optimizer step, if the loss needs it."""

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.policy, self.reference, self.lengths)]
        if shapes != [(self.policy.numel() // 2, 2)] * 3:
            raise ValueError(f"policy, reference and lengths must have one shape [pairs, 2], got {shapes}")


@dataclass(frozen=True, kw_only=True)
class Loss(Settings):
    """A preference loss. Its fields are its settings in `params.yaml`."""

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = True
    """If false, training does not look up reference log-probs, and r(y) is log pi(y|x)."""
    needs_token_logps: ClassVar[bool] = False
    """Whether the loss reads `PairBatch.token_logps`."""
    needs_statistics: ClassVar[bool] = False
    """Whether the loss depends on all pairs of the optimizer step, see `statistics`."""

    def __call__(self, pairs: PairBatch, beta: float) -> Tensor:
        """Return the loss of each pair, shape [P]. `beta` is the strength of the KL constraint.

        Raises:
            ValueError: beta is not positive.
        """
        if not beta > 0:
            raise ValueError(f"beta must be positive, got {beta}")
        return self._forward(pairs, beta)

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        raise NotImplementedError

    def statistics(self, step: PairBatch, beta: float) -> Mapping[str, Tensor]:
        """Return what the loss needs to know about all pairs of an optimizer step, without gradients.

        Training passes the result on as `PairBatch.statistics`, so the loss does not depend on micro-batches.
        """
        raise NotImplementedError

    def rewards(self, policy: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> Tensor:
        """Return the implicit rewards beta r(y), or beta r(y) / |y| if the loss averages over tokens.

        Eq. 5 of Rafailov et al. 2023, up to beta log Z(x), which cancels between the completions of one prompt.
        All three tensors have the same shape, which may be any.
        """
        return beta * self._log_ratios(policy, reference, lengths)

    def _log_ratios(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """Return r(y). Override it to average over tokens."""
        return policy - reference if self.needs_reference else policy

    def _h(self, pairs: PairBatch) -> Tensor:
        ratios = self._log_ratios(pairs.policy, pairs.reference, pairs.lengths)
        return ratios[:, 0] - ratios[:, 1]


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Loss):
    """DPO: -log s(beta h). Rafailov et al. 2023, "Direct Preference Optimization", eq. 7."""

    name: ClassVar[str] = "sigmoid"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return -_log_sigmoid(beta * self._h(pairs))


@dataclass(frozen=True, kw_only=True)
class Ipo(Loss):
    """IPO: (h - 1 / (2 beta))^2, with beta for the paper's tau.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17. The
    paper's formula sums log-ratios over tokens (the default). With `average_over_tokens` each r(y) is divided by
    |y|, which reproduces the authors' code and TRL 1.16; beta then has another scale.
    """

    name: ClassVar[str] = "ipo"
    average_over_tokens: bool = False
    """Divide the log-ratio of each completion by its number of tokens."""

    def _log_ratios(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return (policy - reference) / (lengths if self.average_over_tokens else 1)

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return (self._h(pairs) - 1 / (2 * beta)) ** 2


@dataclass(frozen=True, kw_only=True)
class Conservative(Loss):
    """Conservative DPO: -(1 - e) log s(beta h) - e log s(-beta h), e = label_smoothing.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3.
    """

    name: ClassVar[str] = "conservative"
    label_smoothing: Smoothing = 0.1
    """Probability that chosen and rejected are swapped."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        flipped, h = self.label_smoothing, self._h(pairs)
        return -(1 - flipped) * _log_sigmoid(beta * h) - flipped * _log_sigmoid(-beta * h)


@dataclass(frozen=True, kw_only=True)
class Robust(Loss):
    """Robust DPO: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e), e = label_smoothing.

    Chowdhury et al. 2024, "Provably Robust DPO". If labels are flipped at rate e, its expectation is the `sigmoid`
    loss of the true labels. The loss of a single pair may be negative.
    """

    name: ClassVar[str] = "robust"
    label_smoothing: Smoothing = 0.1
    """Probability that chosen and rejected are swapped."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        flipped, h = self.label_smoothing, self._h(pairs)
        losses = -(1 - flipped) * _log_sigmoid(beta * h) + flipped * _log_sigmoid(-beta * h)
        return losses / (1 - 2 * flipped)


@dataclass(frozen=True, kw_only=True)
class Hinge(Loss):
    """SLiC's hinge loss with log-probs relative to the reference: max(0, 1 - beta h).

    Zhao et al. 2023, "SLiC-HF"; hinge-norm of Liu et al. 2023, "Statistical Rejection Sampling Improves Preference
    Optimization".
    """

    name: ClassVar[str] = "hinge"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return (1 - beta * self._h(pairs)).relu()


@dataclass(frozen=True, kw_only=True)
class LengthNormalised(Sigmoid):
    """Length-normalised DPO: -log s(beta (r(y_w) / |y_w| - r(y_l) / |y_l|)).

    Lambert et al. 2024, "Tulu 3", eq. 6.
    """

    name: ClassVar[str] = "length_normalised"

    def _log_ratios(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return (policy - reference) / lengths


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
        return -_log_sigmoid(beta * self._h(pairs)) - likelihood


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
        return -_log_sigmoid(beta * (self._h(pairs) - self.penalty * lost))


LOSSES: dict[str, type[Loss]] = {
    cls.name: cls for cls in (Sigmoid, Ipo, Conservative, Robust, Hinge, LengthNormalised, Rpo, Dpop)
}
"""Losses by the name that `params.yaml` uses."""

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]


def _log_sigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)
