"""Every loss of pairs with settings of its own, random pairs, and TRL's losses on the same tokens."""

from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from dpo.training import losses
from dpo.training.losses import LOSSES, PairBatch


def smooth(pairs, beta):
    """A loss of the user: softplus(1 - beta h)."""
    ratios = pairs.policy - pairs.reference
    return torch.nn.functional.softplus(1 - beta * (ratios[:, 0] - ratios[:, 1]))


LABELLED = tuple(name for name, cls in LOSSES.items() if "labels" in cls().needs)
"""Losses of labelled rows."""

EXAMPLES = {
    **{name: cls() for name, cls in LOSSES.items() if "labels" not in cls().needs},
    "ipo, averaged": losses.Ipo(average_over_tokens=True),
    "conservative, agreement": losses.Conservative(label_smoothing="agreement"),
    "robust": losses.Robust(label_smoothing=0.2),
    "robust, agreement": losses.Robust(label_smoothing="agreement"),
    "rpo": losses.Rpo(sft_weight=0.4),
    "dpop": losses.Dpop(penalty=4.0),
    "simpo": losses.SimPo(gamma_beta_ratio=0.3),
    "ld_dpo": losses.LdDpo(alpha=0.3),
    "exo": losses.Exo(label_smoothing=0.02),
    "discopop": losses.DiscoPop(temperature=0.2),
    "weighted_sum, wpo": losses.WeightedSum(weights={"aot": 0.5, "aot_unpaired": 2.0, "wpo": 1.5, "ld_dpo": 1}),
    "custom": losses.Custom(function="tests.support.losses:smooth"),
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """P pairs per token: log-probs of policy and reference and collisions [N], lengths [P, 2], agreement [P]."""

    policy: Tensor
    reference: Tensor
    collisions: Tensor
    lengths: Tensor
    agreement: Tensor

    def sums(self, values):
        """The sums [P, 2] of values [N]."""
        return torch.stack([part.sum() for part in self.parts(values)]).view(-1, 2)

    def parts(self, values):
        """The values of each completion, chosen and rejected of the first pair first."""
        return values.split(self.lengths.flatten().tolist())

    def select(self, places):
        """Some pairs, in this order."""
        index = [2 * i + side for i in places for side in (0, 1)]

        def picked(values):
            parts = self.parts(values)
            return torch.cat([parts[i] for i in index])

        values = map(picked, (self.policy, self.reference, self.collisions))
        return Tokens(*values, self.lengths[places], self.agreement[places])

    def batch(self, loss, beta, step=None):
        """The pairs as the loss receives them, in an optimizer step with the pairs of `step`, by default these."""
        pairs = PairBatch(
            self.sums(self.policy), self.sums(self.reference), self.lengths, self.agreement,
            token_logps=self.policy, reference_token_logps=self.reference, collision_logps=self.collisions,
        )  # fmt: skip
        if "statistics" not in loss.needs:
            return pairs
        whole = step or self
        given = PairBatch(whole.sums(whole.policy.detach()), whole.sums(whole.reference), whole.lengths)
        return replace(pairs, statistics=loss.statistics(given, beta))


def random_tokens(pairs=24, seed=0, dtype=torch.float64, longest=9, scale=0.8):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (pairs, 2), generator=generator)
    count = int(lengths.sum())
    reference = -torch.rand(count, generator=generator, dtype=torch.float64) * 3 - scale
    policy = (reference + torch.randn(count, generator=generator, dtype=torch.float64) * scale).clamp(max=-0.01)
    collisions = -torch.rand(count, generator=generator, dtype=torch.float64) * 3
    agreement = torch.rand(pairs, generator=generator, dtype=torch.float64)
    return Tokens(*(t.to(dtype) for t in (policy, reference, collisions)), lengths, agreement.to(dtype))


def loss_and_gradient(loss, tokens, beta, step=None):
    """Losses [P], and the gradient [N] of their sum in the log-probs of the policy's tokens."""
    leaf = tokens.policy.clone().requires_grad_()
    values = loss(replace(tokens, policy=leaf).batch(loss, beta, step), beta)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def trl_loss(
    tokens, policy, beta, *, types, weights=None, smoothing=0.0, ld_alpha=None, weighting=False, tau=0.05
):
    """The mean loss of TRL's DPOTrainer. `policy` has the log-probs of the policy's tokens."""
    from trl import DPOTrainer

    width = int(tokens.lengths.max())

    def padded(values):
        rows = [torch.nn.functional.pad(part, (0, width - len(part))) for part in tokens.parts(values)]
        return torch.stack(rows[0::2] + rows[1::2])

    mask = padded(torch.ones_like(tokens.reference)).bool()
    count = len(mask)

    def outputs(logps):
        return SimpleNamespace(
            log_probs=padded(logps), log_sum_sq_probs=padded(tokens.collisions), entropy=torch.zeros(count, width),
            mean_logits=torch.zeros(count, width), is_top1=torch.zeros(count, width, dtype=torch.bool),
        )  # fmt: skip

    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=model,
        ref_model=lambda **_: outputs(tokens.reference),
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=tau),
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False, ld_alpha=ld_alpha, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        loss_types=types, loss_weights=weights or [1.0] * len(types), label_smoothing=smoothing, beta=beta,
        use_weighting=weighting, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    prompt = torch.zeros(count, 1, dtype=torch.bool)
    inputs = {
        "input_ids": torch.ones(count, 1 + width, dtype=torch.long),
        "attention_mask": torch.cat([~prompt, mask], 1).long(),
        "completion_mask": torch.cat([prompt, mask], 1).long(),
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs(policy), inputs, return_outputs=False)
