"""Losses of h, the difference of the log-ratios of chosen and rejected. See `base` for the notation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from dpo.common.settings import Rate
from dpo.training.losses.base import WITH_REFERENCE, Loss, Need, PairBatch, Smoothing, given, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Loss):
    """DPO: -log s(beta h). Rafailov et al. 2023, "Direct Preference Optimization", eq. 7."""

    name: ClassVar[str] = "sigmoid"

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return -log_sigmoid(beta * self._h(pairs))


@dataclass(frozen=True, kw_only=True)
class Ipo(Loss):
    """IPO: (h - 1 / (2 beta))^2, with beta for the paper's tau.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17. The
    paper's formula sums log-ratios over tokens (the default). With `average_over_tokens` each r(y) is divided by
    |y|, as in TRL 1.16, according to which the authors used this form for the paper's results. Beta then has
    another scale.
    """

    name: ClassVar[str] = "ipo"
    average_over_tokens: bool = False
    """Divide the log-ratio of each completion by its number of tokens."""

    def _log_ratios(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return (policy - reference) / (lengths if self.average_over_tokens else 1)

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        return (self._h(pairs) - 1 / (2 * beta)) ** 2


def _smoothing_needs(smoothing: Smoothing) -> frozenset[Need]:
    return WITH_REFERENCE | {"agreement"} if smoothing == "agreement" else WITH_REFERENCE


def _flipped(smoothing: Smoothing, pairs: PairBatch) -> float | Tensor:
    """Return the probability that chosen and rejected are swapped, [P] if it comes from the data."""
    return 1 - given(pairs.agreement, "agreement") if smoothing == "agreement" else smoothing


@dataclass(frozen=True, kw_only=True)
class Conservative(Loss):
    """Conservative DPO: -(1 - e) log s(beta h) - e log s(-beta h), e = label_smoothing.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3. With `agreement`, e is one
    minus the agreement of the pair, and the loss is the mean of the `sigmoid` loss over people's labels.
    """

    name: ClassVar[str] = "conservative"
    label_smoothing: Smoothing = 0.1
    """Probability that chosen and rejected are swapped. `agreement` takes it from the data; pairs without
    agreement then have 0."""

    @property
    def needs(self) -> frozenset[Need]:
        """Also the agreement, if label smoothing comes from the data."""
        return _smoothing_needs(self.label_smoothing)

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        h, flipped = self._h(pairs), _flipped(self.label_smoothing, pairs)
        return -(1 - flipped) * log_sigmoid(beta * h) - flipped * log_sigmoid(-beta * h)


@dataclass(frozen=True, kw_only=True)
class Robust(Loss):
    """Robust DPO: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2e), e = label_smoothing.

    Chowdhury et al. 2024, "Provably Robust DPO". If labels are flipped at rate e, its expectation is the `sigmoid`
    loss of the true labels. The loss of a single pair may be negative. With `agreement`, e is one minus the
    agreement of the pair, which must be above 0.5.
    """

    name: ClassVar[str] = "robust"
    least_agreement: ClassVar[float] = 0.5
    label_smoothing: Smoothing = 0.1
    """Probability that chosen and rejected are swapped. `agreement` takes it from the data; pairs without
    agreement then have 0."""

    @property
    def needs(self) -> frozenset[Need]:
        """Also the agreement, if label smoothing comes from the data."""
        return _smoothing_needs(self.label_smoothing)

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        h, flipped = self._h(pairs), _flipped(self.label_smoothing, pairs)
        losses = -(1 - flipped) * log_sigmoid(beta * h) + flipped * log_sigmoid(-beta * h)
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
class Exo(Loss):
    """EXO for pairs: KL(q || p) of q = (s(beta h), s(-beta h)) to p = (1 - e, e), e = label_smoothing.

    Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", eq. 16. DPO minimizes
    the KL divergence in the other direction.
    """

    name: ClassVar[str] = "exo"
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Probability of the rejected completion in the target p. 0 would be an infinite loss."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        z, e = beta * self._h(pairs), self.label_smoothing
        chosen = z.sigmoid() * (log_sigmoid(z) - math.log1p(-e))
        return chosen + (-z).sigmoid() * (log_sigmoid(-z) - math.log(e))


@dataclass(frozen=True, kw_only=True)
class DiscoPop(Loss):
    """DiscoPOP: -s(-z / t) log s(z) + s(z / t) exp(-z), z = beta h, t = temperature.

    The log-ratio modulated loss of Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for
    Large Language Models". It is not convex: it has a local minimum at negative margins.
    """

    name: ClassVar[str] = "discopop"
    temperature: Rate = 0.05
    """Width of the change from the logistic to the exponential loss around h = 0."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        z = beta * self._h(pairs)
        # exp(-z) alone overflows at margins that its factor sets to 0.
        exponential = (log_sigmoid(z / self.temperature) - z).exp()
        return -log_sigmoid(z) * (-z / self.temperature).sigmoid() + exponential
