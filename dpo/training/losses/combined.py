"""Losses that are made of others, and losses of the user. See `base` for the notation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator

from dpo.common import functions
from dpo.common.errors import InputError
from dpo.common.settings import Rate
from dpo.training.losses.base import Loss, Need, PairBatch

if TYPE_CHECKING:
    from torch import Tensor


def _known(weights: Mapping[str, float]) -> Mapping[str, float]:
    from dpo.training.losses import LOSSES

    sums = (WeightedSum, Custom)
    possible = [name for name, cls in LOSSES.items() if cls not in sums and "labels" not in cls().needs]
    if not weights or not weights.keys() <= {*possible}:
        raise ValueError(f"the losses must be among {', '.join(possible)}")
    return weights


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Loss):
    """The sum of losses with their default settings, each times its weight. All have the same beta.

    The default is MPO: 0.8 `sigmoid` + 0.2 `bco` + 1.0 `sft`. Wang et al. 2024, "Enhancing the Reasoning Ability
    of Multimodal Large Language Models via Mixed Preference Optimization". RPO is `sigmoid` + `sft`. Implicit
    rewards are beta r(y), whatever the parts; without a part that needs the reference, beta log pi(y|x).
    """

    name: ClassVar[str] = "weighted_sum"
    weights: Annotated[Mapping[str, Rate], AfterValidator(_known)] = field(
        default_factory=lambda: {"sigmoid": 0.8, "bco": 0.2, "sft": 1.0}
    )
    """Weight of each loss, by its name."""

    @property
    def parts(self) -> dict[str, Loss]:
        """The losses, by name."""
        from dpo.training.losses import LOSSES

        return {name: LOSSES[name]() for name in self.weights}

    @property
    def needs(self) -> frozenset[Need]:
        """What any of the parts needs."""
        return frozenset[Need]().union(*(part.needs for part in self.parts.values()))

    def statistics(self, step: PairBatch, beta: float) -> Mapping[str, Tensor]:
        """Return the statistics of the parts under the names `PART/NAME`."""
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            if "statistics" in part.needs
            for key, value in part.statistics(step, beta).items()
        }

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        statistics = {tuple(key.split("/")): value for key, value in (pairs.statistics or {}).items()}
        total = 0 * pairs.policy[:, 0]
        for name, part in self.parts.items():
            own = {key: value for (owner, key), value in statistics.items() if owner == name}
            total = total + self.weights[name] * part(dataclasses.replace(pairs, statistics=own), beta)
        return total


@dataclass(frozen=True, kw_only=True)
class Custom(Loss):
    """A Python function of the user. Implicit rewards are beta r(y)."""

    name: ClassVar[str] = "custom"
    function: str = ""
    """`module:function` that maps a `PairBatch` of P pairs and beta to the losses of the pairs, a tensor [P]. The
    module is in `functions/losses/`."""

    @property
    def source(self) -> str:
        """SHA-256 of the files in the folder of the function."""
        return functions.LOSS.digest(self.function)

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        losses: Tensor = functions.LOSS.load(self.function, "params.yaml: losses.custom.function")(pairs, beta)
        if tuple(losses.shape) != (len(pairs.policy),):
            raise InputError(
                f"params.yaml: losses.custom.function: '{self.function}' returned a tensor of shape "
                f"{tuple(losses.shape)} for {len(pairs.policy)} pairs; return one loss per pair"
            )
        return losses
