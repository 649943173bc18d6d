"""What all preference losses share: their input, their interface and their common terms.

Notation: y_w is the chosen and y_l the rejected completion of a prompt x, r(y) = log pi(y|x) - log pi_ref(y|x),
h = r(y_w) - r(y_l), s is the logistic function and |y| the number of tokens of y.

The modules of this package import torch on first use, because every command reads the settings of the losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dpo.common.errors import InputError
from dpo.common.settings import Settings, one_error

if TYPE_CHECKING:
    from torch import Tensor

Smoothing = Annotated[
    Annotated[float, Field(ge=0, lt=0.5)] | Literal["agreement"],
    one_error("must be agreement, or a number at least 0 and below 0.5"),
]

Need = Literal[
    "reference", "agreement", "labels", "token_logps", "reference_token_logps", "collision_logps", "statistics"
]  # fmt: skip
"""Names of fields of `PairBatch`. `reference_token_logps` cost a forward pass over all pairs before training,
`collision_logps` and `statistics` a second forward pass in each step. A loss that needs `labels` trains on
labelled rows, and all others on pairs."""

WITH_REFERENCE: frozenset[Need] = frozenset({"reference"})
PER_TOKEN: frozenset[Need] = frozenset({"token_logps", "reference_token_logps", "collision_logps"})


@dataclass(frozen=True)
class PairBatch:
    """P preference pairs, chosen first, with N completion tokens.

    A labelled row has its own completion first, and then one of another prompt.

    Raises:
        ValueError: the shapes differ. Broadcasting would mix pairs.
    """

    policy: Tensor
    """log pi(y|x), summed over completion tokens, in nats, shape [P, 2]."""
    reference: Tensor
    """log pi_ref(y|x), shape [P, 2]."""
    lengths: Tensor
    """Number of tokens of each completion, at least 1, shape [P, 2]."""
    agreement: Tensor | None = None
    """Probability that a random person prefers chosen, 1 if unknown, shape [P], if the loss needs it."""
    _: KW_ONLY
    labels: Tensor | None = None
    """1 for a desirable and 0 for an undesirable completion, shape [P], if the rows are labelled."""
    token_logps: Tensor | None = None
    """Log-probs of the policy for all completion tokens, in order, shape [N], if the loss needs them."""
    reference_token_logps: Tensor | None = None
    """The same of the reference."""
    collision_logps: Tensor | None = None
    """log sum_v pi(v)^2 over the vocabulary at each completion token, without gradient, shape [N], if needed."""
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
    least_agreement: ClassVar[float] = -1
    """Agreements must exceed this if label smoothing takes them from the data; -1 allows all."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the loss needs besides log-probs of the policy. Without `reference`, r(y) is log pi(y|x)."""
        return WITH_REFERENCE

    @property
    def source(self) -> str:
        """SHA-256 of the user's code that the loss calls, or an empty text if it calls none."""
        return ""

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
        return policy - reference if "reference" in self.needs else policy

    def _h(self, pairs: PairBatch) -> Tensor:
        ratios = self._log_ratios(pairs.policy, pairs.reference, pairs.lengths)
        return ratios[:, 0] - ratios[:, 1]

    def _rewards(self, pairs: PairBatch, beta: float) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards of chosen and rejected, each [P]."""
        chosen, rejected = self.rewards(pairs.policy, pairs.reference, pairs.lengths, beta).unbind(1)
        return chosen, rejected


def log_sigmoid(x: Tensor) -> Tensor:
    """Return log s(x)."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def given(values: Tensor | None, name: str) -> Tensor:
    """Return an optional field of a `PairBatch`.

    Raises:
        ValueError: it is absent.
    """
    if values is None:
        raise ValueError(f"this loss needs PairBatch.{name}")
    return values


def check_rows(losses: Iterable[Loss], *, labelled: bool) -> None:
    """Raise InputError if a loss cannot train on the rows: labelled rows, or else pairs."""
    for loss in losses:
        if ("labels" in loss.needs) == labelled:
            continue
        if labelled:
            problem = "needs pairs, but the rows of the data have one completion with a label"
            fix = (
                "use kto in sweep.losses, or set data.pair_labels: true to make pairs of prompts with both labels"
            )
        else:
            problem = "needs rows of one completion with a label, but the data has pairs"
            fix = "use a loss for pairs, such as sigmoid"
        key = "losses" if "reference" in loss.needs else "reference_free_losses"
        raise InputError(f"params.yaml: sweep.{key}: {loss.name} {problem}; {fix}")


def check_agreement(losses: Iterable[Loss], agreement: Mapping[str, float]) -> None:
    """Check the agreements of pairs, by id, from which losses take their label smoothing.

    Raises:
        InputError: no pair has an agreement, or the loss is not defined for one.
    """
    for loss in losses:
        if "agreement" not in loss.needs:
            continue
        where = f"params.yaml: losses.{loss.name}.label_smoothing: agreement"
        if not agreement:
            fix = "add the field `agreement` to the data, or set a number"
            raise InputError(f"{where}: no pair has an agreement; {fix}")
        low = [each for each, value in agreement.items() if value <= loss.least_agreement]
        if low:
            raise InputError(
                f"{where}: {loss.name} needs agreements above {loss.least_agreement}, but those of {len(low)} "
                f"pairs are not, for example {agreement[low[0]]} of {low[0]!r}; remove these pairs, use the loss "
                "conservative, or set a number"
            )
