"""Preference losses. Each class holds the equation, its source, its settings and its code."""

from typing import TYPE_CHECKING, Literal

from dpo.training.losses.base import Loss, PairBatch, check_agreement, check_rows
from dpo.training.losses.combined import Custom, WeightedSum
from dpo.training.losses.labelled import Kto
from dpo.training.losses.margin import (
    Conservative,
    DiscoPop,
    Exo,
    Hinge,
    Ipo,
    LengthNormalised,
    Robust,
    Sigmoid,
)
from dpo.training.losses.reference_free import Orpo, Sft, SimPo
from dpo.training.losses.separate import ApoDown, ApoZero, Bco, Dpop, Nca, Rpo, SppoHard
from dpo.training.losses.step import Aot, AotUnpaired
from dpo.training.losses.tokens import LdDpo, Wpo

LOSSES: dict[str, type[Loss]] = {
    cls.name: cls
    for cls in (
        *(Sigmoid, Ipo, Conservative, Robust, Hinge, LengthNormalised, Rpo, Dpop),
        *(ApoZero, ApoDown, SimPo, Orpo, Wpo, LdDpo, Exo, Nca, SppoHard, DiscoPop, Aot, AotUnpaired),
        *(Bco, Sft, Kto, WeightedSum, Custom),
    )
}
"""Losses by the name that `params.yaml` uses."""

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]

__all__ = [
    "LOSSES",
    "Aot",
    "AotUnpaired",
    "ApoDown",
    "ApoZero",
    "Bco",
    "Conservative",
    "Custom",
    "DiscoPop",
    "Dpop",
    "Exo",
    "Hinge",
    "Ipo",
    "Kto",
    "LdDpo",
    "LengthNormalised",
    "Loss",
    "LossName",
    "Nca",
    "Orpo",
    "PairBatch",
    "Robust",
    "Rpo",
    "Sft",
    "Sigmoid",
    "SimPo",
    "SppoHard",
    "WeightedSum",
    "Wpo",
    "check_agreement",
    "check_rows",
]
