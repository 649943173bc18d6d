"""Losses that compare distributions over all pairs of an optimizer step. See `base` for the notation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo.training.losses.base import WITH_REFERENCE, Loss, PairBatch, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Aot(Loss):
    """AOT, paired: -log s(beta (a_(k) - b_(k))), a = log pi(y_w|x) / pi(y_l|x), b the same of the reference.

    a_(k) and b_(k) are the k-th smallest values among the pairs of the optimizer step. Melnyk et al. 2024,
    "Distributional Preference Alignment of LLMs via Optimal Transport". With one pair per step it is DPO.
    """

    name: ClassVar[str] = "aot"
    needs = WITH_REFERENCE | {"statistics"}

    def statistics(self, step: PairBatch, beta: float) -> Mapping[str, Tensor]:
        """Return the sorted margins of policy and reference."""
        return {"policy": _margins(step.policy).sort().values, "reference": _margins(step.reference).sort().values}

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        step, margins = _step(pairs), _margins(pairs.policy)
        return -log_sigmoid(beta * (margins - step["reference"][_ranks(margins, step["policy"])]))


@dataclass(frozen=True, kw_only=True)
class AotUnpaired(Loss):
    """AOT, unpaired: -log s(beta (c_(k) - d_(k))), c = r(y_w), d = r(y_l).

    c_(k) and d_(k) are the k-th smallest values among the pairs of the optimizer step. Melnyk et al. 2024,
    "Distributional Preference Alignment of LLMs via Optimal Transport". A completion is compared with one of
    another pair, so the loss of a pair is the mean of two terms, one for each of its completions.
    """

    name: ClassVar[str] = "aot_unpaired"
    needs = WITH_REFERENCE | {"statistics"}

    def statistics(self, step: PairBatch, beta: float) -> Mapping[str, Tensor]:
        """Return the sorted log-ratios of chosen and of rejected."""
        chosen, rejected = (step.policy - step.reference).unbind(1)
        return {"chosen": chosen.sort().values, "rejected": rejected.sort().values}

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        step = _step(pairs)
        chosen, rejected = (pairs.policy - pairs.reference).unbind(1)
        above = chosen - step["rejected"][_ranks(chosen, step["chosen"])]
        below = step["chosen"][_ranks(rejected, step["rejected"])] - rejected
        terms = -log_sigmoid(beta * above) - log_sigmoid(beta * below)
        # Each term occurs twice in the step, once for each of its completions; each has the gradient of one.
        return terms - terms.detach() / 2


def _margins(logps: Tensor) -> Tensor:
    return logps[:, 0] - logps[:, 1]


def _step(pairs: PairBatch) -> Mapping[str, Tensor]:
    if pairs.statistics is None:
        raise ValueError("this loss needs PairBatch.statistics")
    return pairs.statistics


def _ranks(values: Tensor, ordered: Tensor) -> Tensor:
    """Return the places of values in a sorted tensor, by the nearest value: micro-batches round differently."""
    import torch

    return torch.searchsorted((ordered[1:] + ordered[:-1]) / 2, values.detach().contiguous())
