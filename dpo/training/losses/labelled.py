"""Losses of labelled rows, which have one completion y that is desirable or not. See `base` for the notation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo.common.settings import Rate
from dpo.training.losses.base import WITH_REFERENCE, Loss, PairBatch, given

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Kto(Loss):
    """KTO: w (1 - s(beta (r(y) - z))) for a desirable y, w (1 - s(beta (z - r(y)))) for an undesirable one.

    z = max(0, mean of r(y')) estimates KL(pi || pi_ref) from completions y' of other prompts, without gradient,
    over all rows of the optimizer step. Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic
    Optimization", eq. 7, as in TRL 1.16.
    """

    name: ClassVar[str] = "kto"
    needs = WITH_REFERENCE | {"labels", "statistics"}
    desirable_weight: Rate = 1.0
    """w of desirable rows. Eq. 8 of the paper advises a ratio of the weights that, times the ratio of the
    numbers of rows, is from 1 to 4/3."""
    undesirable_weight: Rate = 1.0
    """w of undesirable rows."""

    def statistics(self, step: PairBatch, beta: float) -> Mapping[str, Tensor]:
        """Return z, and the share of desirable rows."""
        other = (step.policy - step.reference)[:, 1]
        return {"kl": other.mean().clamp(min=0), "desirable": given(step.labels, "labels").mean()}

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        labels = given(pairs.labels, "labels")
        if pairs.statistics is None:
            raise ValueError("this loss needs PairBatch.statistics")
        sign = 2 * labels - 1
        ratios = (pairs.policy - pairs.reference)[:, 0]
        weights = labels * self.desirable_weight + (1 - labels) * self.undesirable_weight
        return weights * (-beta * sign * (ratios - pairs.statistics["kl"])).sigmoid()
