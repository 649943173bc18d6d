"""Settings of supervised fine-tuning, preference training and the sweep over its trials."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from dpo.common.settings import Distinct, Positive, Rate, Seed, Settings, Several
from dpo.data.settings import Sources
from dpo.training.losses import Loss, LossName

Method = Literal["online", "rloo"]
"""Training on own responses: DPO on pairs of them, or RLOO."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """What supervised fine-tuning and preference training share."""

    epochs: Positive
    """Passes over the training pairs."""
    pairs_per_step: Positive
    """Effective batch size, in pairs."""
    optimizer: Literal["adamw", "rmsprop", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The paper's code uses RMSprop; AdamW is common since. The 8-bit optimizers
    are those of bitsandbytes; the paged one needs a CUDA GPU."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps, rounded down, in which the learning rate rises linearly; 0.1 in Tunstall et al. 2023,
    "Zephyr: Direct Distillation of LM Alignment", section 4."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Data type of trained matrices of the layers and of their gradients. Updates of `bf16` are rounded
    stochastically, so that small ones are not lost. It needs `engine.precision: bf16`, `adamw` and no adapter."""
    max_grad_norm: Rate = 1.0
    """Norm to which gradients are clipped; 10 in the paper's code."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more time. `offload` also moves the
    inputs of the layers to host memory until the backward pass."""
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the load-balancing loss of the routers (Fedus et al. 2021, "Switch Transformers", eq. 4-6),
    which is added to the loss. For mixtures of experts only."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do if the loss or gradient of a step is not finite. The pairs of the step are saved either way."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """Low-rank adapters on linear layers (Hu et al. 2021), without dropout."""

    rank: Positive
    """Inner dimension of each update."""
    alpha: Positive
    """Updates are scaled by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of linear layers, as `[q_proj, v_proj]`; `all-linear` is every one except the output, and in a mixture
    of experts the matrices of the experts, too, but no router."""
    rslora: bool = False
    """Scale updates by alpha / sqrt(rank) instead (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor")."""
    dora: bool = False
    """Train the norm of each output's weights separately (Liu et al. 2024, "DoRA")."""


@dataclass(frozen=True, kw_only=True)
class SftSettings(OptimizerSettings):
    """Supervised fine-tuning of the reference. `sft: null` uses the base model as the reference."""

    learning_rate: Rate
    """Peak learning rate."""
    completions: Literal["both", "chosen"] = "both"
    """Completions to train on. `both` keeps the reference neutral (Rafailov et al. 2023, section 6)."""
    max_pairs: Positive | None = None
    """Maximum number of training pairs whose texts are used, or of demonstrations; null uses all."""
    source: Sources | None = None
    """Demonstrations to train on, in place of the completions of the training pairs: a file or folder under
    `data/own/`, the hub id of a data set, or a list of files, folders and sections as in `data.source`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Required for a hub id."""
    split: str | tuple[str, ...] | None = None
    """Splits of a hub data set or of a folder to read; null reads all."""
    config: str | None = None
    """Configuration of a hub data set, if it has several."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the demonstrations with other names, as in `data.columns`."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = field(default_factory=dict)
    """Roles of the demonstrations with other names, as in `data.roles`."""
    lora: LoraSettings | None = None
    """Train adapters and merge them into the reference; null trains all weights."""


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
class Trial:
    """One point of the sweep: one policy."""

    loss: Loss
    beta: float
    learning_rate: float
    seed: int
    method: Method | None = None
    """None trains on the pairs of the data."""
    rounds: int | None = None
    """Number of rounds of a method. RLOO has implicit rewards as DPO with the loss `sigmoid`."""

    @property
    def name(self) -> str:
        """DVC's name of the trial, and the name of its files."""
        parts = (self.method, self.rounds, None if self.method == "rloo" else self.loss.name, self.beta)
        return "-".join(str(part) for part in (*parts, self.learning_rate, self.seed) if part is not None)

    @property
    def objective(self) -> str:
        """`rloo`, or the name of the loss."""
        return "rloo" if self.method == "rloo" else self.loss.name

    @property
    def list_name(self) -> str:
        """The key in params.yaml that lists the rounds."""
        return "sweep.rloo" if self.method == "rloo" else "sweep.rounds"

    @property
    def settings(self) -> dict[str, Any]:
        """The loss by name, beta, learning rate, seed, any method and rounds, and the settings of the loss."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        return {**fields, "loss": self.objective, **asdict(self.loss)}


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """One policy is trained for every combination of these lists."""

    losses: Annotated[tuple[LossName, ...], Distinct]
    """Losses that need reference log-probs, by name."""
    reference_free_losses: Annotated[tuple[LossName, ...], Distinct]
    """Losses that need no reference log-probs, by name. Their trials do not wait for the reference log-probs."""
    betas: Annotated[tuple[Positive | Rate, ...], *Several]
    """Strengths of the KL constraint (Rafailov et al. 2023, eq. 7)."""
    learning_rates: Annotated[tuple[Rate, ...], *Several]
    """Peak learning rates."""
    seeds: Annotated[tuple[Seed, ...], *Several]
    """Seeds of the order of the training pairs."""
    rounds: Annotated[tuple[Positive, ...], Distinct] = ()
    """Numbers of rounds of on-policy training (`online`). An empty list trains on the pairs of the data only."""
    rloo: Annotated[tuple[Positive, ...], Distinct] = ()
    """Numbers of rounds of RLOO (`online`), without the losses. As many rounds as steps sample each step from the
    current policy."""
    reward_models: Annotated[tuple[Seed, ...], Distinct] = ()
    """Seeds of reward models (`reward_model`), one model for each. `feedback: reward_model` uses the one with the
    seed of the trial, or the only one."""
