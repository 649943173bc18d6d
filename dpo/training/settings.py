"""Settings of supervised fine-tuning, preference training and the sweep over its trials."""

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dpo.common.settings import Positive, Rate, Seed, Settings, Several

LossName = Literal["sigmoid", "ipo", "conservative", "robust", "hinge", "length_normalised", "rpo", "dpop"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """What supervised fine-tuning and preference training share."""

    epochs: Positive
    """Passes over the training pairs."""
    pairs_per_step: Positive
    """Effective batch size, in pairs."""
    optimizer: Literal["adamw", "rmsprop", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The paper's code uses RMSprop; AdamW is common since. The 8-bit optimizers need a CUDA GPU."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps, rounded down, in which the learning rate rises linearly; 0.1 in Tunstall et al. 2023,
    "Zephyr: Direct Distillation of LM Alignment", section 4."""
    max_grad_norm: Rate = 1.0
    """Norm to which gradients are clipped; 10 in the paper's code."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do if the loss or gradient of a step is not finite. The pairs of the step are saved either way."""


@dataclass(frozen=True, kw_only=True)
class SftSettings(OptimizerSettings):
    """Supervised fine-tuning of the reference."""

    learning_rate: Rate
    """Peak learning rate."""
    completions: Literal["both", "chosen"] = "both"
    """Completions to train on. `both` keeps the reference neutral (Rafailov et al. 2023, section 6)."""
    max_pairs: Positive | None = None
    """Maximum number of training pairs whose texts are used; null uses all."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """Low-rank adapters on every linear layer except the output (Hu et al. 2021), without dropout."""

    rank: Positive
    """Inner dimension of each update."""
    alpha: Positive
    """Updates are scaled by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopSettings(Settings):
    """When to stop before the last epoch. The weights with the lowest validation loss are kept."""

    validation_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the training pairs to validate on. Held-out pairs are never used."""
    every_steps: Positive
    """Steps between two validations."""
    patience: Positive
    """Number of consecutive validations without improvement that ends the training."""


@dataclass(frozen=True, kw_only=True)
class DpoSettings(OptimizerSettings):
    """Preference training, the same for every trial of the sweep."""

    lora: LoraSettings | None = None
    """Train adapters and save them alone; null trains all weights."""
    early_stop: EarlyStopSettings | None = None
    """Null trains all epochs."""


@dataclass(frozen=True, kw_only=True)
class PlainLoss(Settings):
    """A loss without settings."""


@dataclass(frozen=True, kw_only=True)
class SmoothedLoss(Settings):
    """A loss that expects some labels to be wrong."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Probability that chosen and rejected are swapped."""


@dataclass(frozen=True, kw_only=True)
class RegularisedLoss(Settings):
    """A loss with the likelihood of chosen added."""

    sft_weight: Rate = 1.0
    """Weight of the mean negative log-likelihood per token of the chosen completion."""


@dataclass(frozen=True, kw_only=True)
class PenalisedLoss(Settings):
    """A loss that keeps the likelihood of chosen from falling."""

    penalty: Rate = 50.0
    """Weight of the nats that chosen has lost against the reference."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Settings of each loss. `dpo.training.losses` has the equations."""

    sigmoid: PlainLoss = field(default_factory=PlainLoss)
    ipo: PlainLoss = field(default_factory=PlainLoss)
    conservative: SmoothedLoss = field(default_factory=SmoothedLoss)
    robust: SmoothedLoss = field(default_factory=SmoothedLoss)
    hinge: PlainLoss = field(default_factory=PlainLoss)
    length_normalised: PlainLoss = field(default_factory=PlainLoss)
    rpo: RegularisedLoss = field(default_factory=RegularisedLoss)
    dpop: PenalisedLoss = field(default_factory=PenalisedLoss)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the sweep: one policy."""

    loss: LossName
    beta: float
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """DVC's name of the trial, and the name of its files."""
        return f"{self.loss}-{self.beta}-{self.learning_rate}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """One policy is trained for every combination of these lists."""

    losses: Annotated[tuple[LossName, ...], *Several]
    """Losses, by name."""
    betas: Annotated[tuple[Positive | Rate, ...], *Several]
    """Strengths of the KL constraint (Rafailov et al. 2023, eq. 7)."""
    learning_rates: Annotated[tuple[Rate, ...], *Several]
    """Peak learning rates."""
    seeds: Annotated[tuple[Seed, ...], *Several]
    """Seeds of the order of the training pairs."""

    def trials(self) -> list[Trial]:
        """Return all trials, in DVC's order."""
        combinations = itertools.product(self.losses, self.betas, self.learning_rates, self.seeds)
        return [
            Trial(loss=loss, beta=beta, learning_rate=rate, seed=seed) for loss, beta, rate, seed in combinations
        ]
