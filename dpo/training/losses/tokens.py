"""Losses that need values per token. See `base` for the notation.

Without these values, as in the evaluation of held-out pairs, they are the `sigmoid` loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo.common.settings import Share
from dpo.training.losses.base import WITH_REFERENCE, PairBatch, log_sigmoid
from dpo.training.losses.margin import Sigmoid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Wpo(Sigmoid):
    """WPO: -w(y_w) w(y_l) log s(beta h), w(y) = exp(mean_t(log pi(y_t) - log sum_v pi(v)^2)), without gradient.

    Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", eq. 2, with the paper's sampled
    alignment: completions count by how likely the policy itself would write them.
    """

    name: ClassVar[str] = "wpo"
    needs = WITH_REFERENCE | {"token_logps", "collision_logps"}

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        if pairs.token_logps is None or pairs.collision_logps is None:
            return super()._forward(pairs, beta)
        aligned = (pairs.token_logps - pairs.collision_logps).detach()
        means = _sums(aligned, pairs.lengths) / pairs.lengths
        return super()._forward(pairs, beta) * means.sum(1).exp()


@dataclass(frozen=True, kw_only=True)
class LdDpo(Sigmoid):
    """LD-DPO: DPO in which tokens after the length of the shorter completion count alpha.

    Liu et al. 2024, "Length Desensitization in Direct Preference Optimization". The weights apply to policy and
    reference. Implicit rewards are those of `sigmoid`.
    """

    name: ClassVar[str] = "ld_dpo"
    needs = WITH_REFERENCE | {"token_logps", "reference_token_logps"}
    alpha: Share = 0.5
    """Weight of the excess tokens: 1 is DPO, 0 ignores them."""

    def _forward(self, pairs: PairBatch, beta: float) -> Tensor:
        import torch

        if pairs.token_logps is None or pairs.reference_token_logps is None:
            return super()._forward(pairs, beta)
        lengths = pairs.lengths.flatten()
        shared = pairs.lengths.amin(1).repeat_interleave(2)
        starts = lengths.cumsum(0) - lengths
        places = torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)
        ratios = pairs.token_logps - pairs.reference_token_logps
        counted = ratios.where(places < shared.repeat_interleave(lengths), self.alpha * ratios)
        sums = _sums(counted, pairs.lengths)
        return -log_sigmoid(beta * (sums[:, 0] - sums[:, 1]))


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums [P, 2] of values [N] per completion token."""
    import torch

    index = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths.flatten())
    return values.new_zeros(lengths.numel()).index_add(0, index, values).view(-1, 2)
