"""What a training step minimizes, and what it logs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from dpo.engine.packing import PackedBatch
from dpo.engine.reference_cache import ReferenceLogps
from dpo.engine.tokenization import TokenRow
from dpo.training.losses import Loss, PairBatch
from dpo.training.losses.base import PER_TOKEN

Reference = Callable[[PackedBatch], Tensor]
"""Returns the reference log-probs [2P] of the completions of P pairs, chosen first."""

Weights = Mapping[str, float]
"""A number for each pair by its id, 1 for the others."""


class SftObjective:
    """Negative log-likelihood of the completions in nats. The loss of a step is the mean over their tokens."""

    extra_passes = 0

    def units(self, row: TokenRow) -> int:
        """Return the number of completion tokens."""
        return row.completion_tokens

    def begin_step(self, model: nn.Module, batches: Sequence[PackedBatch], weights: Sequence[int]) -> None:
        """Do nothing."""

    def __call__(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss and no metrics."""
        return -model(batch).sum(), {}


class DpoObjective:
    """A preference loss, and metrics under the names that TRL uses. The loss of a step is the mean over pairs.

    The loss of a pair is multiplied by its weight. `reference_tokens` has the reference log-probs of each row's
    completion tokens, if the loss needs them.
    """

    def __init__(
        self, loss: Loss, beta: float, reference: Reference, *, weights: Weights | None = None,
        agreement: Weights | None = None, labels: Weights | None = None,
        reference_tokens: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.loss, self.beta, self.reference = loss, beta, reference
        self.weights, self.agreement, self.labels = weights or {}, agreement or {}, labels or {}
        self.reference_tokens = reference_tokens or {}
        self.statistics: Mapping[str, Tensor] | None = None

    @property
    def extra_passes(self) -> int:
        """Number of forward passes of a step besides the one with a backward pass."""
        for_collisions, for_statistics = ("collision_logps" in self.loss.needs), ("statistics" in self.loss.needs)
        return for_collisions + for_statistics * (1 + for_collisions)

    def units(self, row: TokenRow) -> int:
        """Return 1."""
        return 1

    @torch.no_grad()
    def begin_step(self, model: nn.Module, batches: Sequence[PackedBatch], weights: Sequence[int]) -> None:
        """Compute the statistics of all pairs of the step, in all processes, if the loss needs them.

        `batches` are all micro-batches of this process. Those with weight 0 are placeholders and do not count.
        """
        if "statistics" not in self.loss.needs:
            return
        pairs = [vars(self._pairs(model, batch)) for batch in batches]
        tensors = [{name: t.cpu() for name, t in each.items() if isinstance(t, Tensor)} for each in pairs]
        parts = gather_object(list(itertools.compress(tensors, weights)))
        step: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        statistics = self.loss.statistics(PairBatch(**step), self.beta)
        self.statistics = {name: value.to(batches[0].input_ids.device) for name, value in statistics.items()}

    def __call__(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss, and sums of rewards, log-probs and log-ratios."""
        pairs = self._pairs(model, batch)
        losses = self.loss(pairs, self.beta)
        if self.weights:
            losses = losses * _by_id(self.weights, batch)
        return losses.sum(), self._metrics(pairs) if pairs.labels is None else self._label_metrics(pairs)

    def _metrics(self, pairs: PairBatch) -> dict[str, Tensor]:
        policy, reference = pairs.policy.detach(), pairs.reference
        chosen, rejected = self.loss.rewards(policy, reference, pairs.lengths, self.beta).unbind(1)
        margins = chosen - rejected
        sums = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": margins.sum(),
            "rewards/accuracies": ((margins.sign() + 1) / 2).sum(),  # ties count one half
        }
        sums["logps/chosen"], sums["logps/rejected"] = policy.sum(0)
        if "reference" in self.loss.needs:
            sums["logratios/chosen"], sums["logratios/rejected"] = (policy - reference).sum(0)
        return sums

    def _label_metrics(self, pairs: PairBatch) -> dict[str, Tensor]:
        """Return the same metrics of labelled rows. Divided by the rows of the step, they are means per label.

        A label that no row of the step has is left out.
        """
        assert pairs.labels is not None
        assert pairs.statistics is not None
        policy, reference = pairs.policy[:, 0].detach(), pairs.reference[:, 0]
        rewards = self.loss.rewards(policy, reference, pairs.lengths[:, 0], self.beta)
        right = ((2 * pairs.labels - 1) * rewards).sign()
        sums = {"rewards/accuracies": ((right + 1) / 2).sum(), "kl": pairs.statistics["kl"] * len(rewards)}
        desirable = pairs.statistics["desirable"]
        sides = (("chosen", pairs.labels, desirable), ("rejected", 1 - pairs.labels, 1 - desirable))
        present = [(name, mask / share) for name, mask, share in sides if share > 0]
        for name, weights in present:
            sums[f"rewards/{name}"] = (weights * rewards).sum()
            sums[f"logps/{name}"] = (weights * policy).sum()
            sums[f"logratios/{name}"] = (weights * (policy - reference)).sum()
        if len(present) == 2:
            sums["rewards/margins"] = sums["rewards/chosen"] - sums["rewards/rejected"]
        return sums

    def _pairs(self, model: nn.Module, batch: PackedBatch) -> PairBatch:
        needs = self.loss.needs
        tokens = model(batch, per_token=True) if needs & PER_TOKEN else None
        policy = (model(batch) if tokens is None else batch.sum_per_completion(tokens)).view(-1, 2)
        device, reference, reference_tokens, collisions = policy.device, torch.zeros_like(policy), None, None
        if "reference" in needs:
            reference = self.reference(batch).to(device).view(-1, 2)
        if "reference_token_logps" in needs:
            reference_tokens = torch.cat([self.reference_tokens[i] for i in batch.ids]).to(device)
        if "collision_logps" in needs:
            with torch.no_grad():
                collisions = model(batch, collisions=True)
        return PairBatch(
            policy, reference, batch.lengths.view(-1, 2),
            agreement=_by_id(self.agreement, batch) if "agreement" in needs else None,
            labels=_by_id(self.labels, batch) if "labels" in needs else None,
            token_logps=tokens, reference_token_logps=reference_tokens, collision_logps=collisions,
            statistics=self.statistics,
        )  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Values of the sampled answers to one prompt, in their order."""

    scores: Sequence[float]
    policy_logps: Sequence[float]
    """Log-probs of the policy that sampled them."""
    reference_logps: Sequence[float]
    advantages: Sequence[float]


class RlooObjective:
    """The policy gradient of all answers to a prompt. The loss of a step is the mean over answers.

    The loss of an answer y is -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), with its advantage A and the ratio
    r = pi(y|x) / pi_old(y|x) to the policy that sampled it (Schulman et al. 2017, eq. 7, with one ratio per
    answer). At r = 1 its gradient is that of -A log pi(y|x).
    """

    extra_passes = 0

    def __init__(self, answers: Mapping[str, Answers], clip: float) -> None:
        self.answers, self.clip = answers, clip

    def units(self, row: TokenRow) -> int:
        """Return 1."""
        return 1

    def begin_step(self, model: nn.Module, batches: Sequence[PackedBatch], weights: Sequence[int]) -> None:
        """Do nothing."""

    def __call__(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over prompts of the mean loss of their answers, and sums of such means."""
        logps = model(batch)
        rows = [self.answers[each] for each in batch.ids]
        shares = logps.new_tensor([1 / len(row.scores) for row in rows for _ in row.scores])
        scores, old, reference, advantages = (
            logps.new_tensor([value for row in rows for value in getattr(row, name)])
            for name in ("scores", "policy_logps", "reference_logps", "advantages")
        )
        ratios = (logps - old).exp()
        clipped = ratios.clamp(1 - self.clip, 1 + self.clip)
        losses = -torch.minimum(ratios * advantages, clipped * advantages)
        with torch.no_grad():
            beyond = ((ratios - 1) * advantages.sign() > self.clip).to(shares)
            kl = logps - reference
            sums = {"score": shares @ scores, "kl": shares @ kl, "clip_ratio": shares @ beyond}
        return shares @ losses, sums


def _by_id(values: Weights, batch: PackedBatch) -> Tensor:
    return torch.tensor([values.get(i, 1.0) for i in batch.ids], device=batch.input_ids.device)


Objective = SftObjective | DpoObjective | RlooObjective


def cached_reference(table: ReferenceLogps, ids: Sequence[str]) -> Reference:
    """Return a function that looks reference log-probs up by pair id.

    Raises:
        KeyError: one of the `ids` has no reference log-probs.
    """
    if missing := table.missing(ids):
        raise KeyError(f"no reference log-probs for {len(missing)} pairs, the first is {missing[0]!r}")
    return lambda batch: torch.tensor([table[i] for i in batch.ids], dtype=torch.float32).flatten()
