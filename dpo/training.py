"""SFT and DPO under `transformers.Trainer`: our batches and our loss, its loop."""

import copy
import functools
import hashlib
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dpo.batching import StepSampler, TokenRow, pack
from dpo.config import Cell, DpoParams, EarlyStopParams, LoraParams, LossParams, OptimizerParams, SftParams
from dpo.errors import InputError
from dpo.files import PROVENANCE, sha256, write_json, written_whole
from dpo.logps import packed_batches
from dpo.losses import nll_loss, preference_loss

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "rmsprop": "rmsprop",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}

ALARM_NATS = 100.0
"""Mean change of a completion's log-prob that a sound run does not reach: a factor of e^100 in its probability."""

log = logging.getLogger(__name__)

Packed = dict[str, Any]
Objective = Callable[[torch.nn.Module, Packed], tuple[Tensor, dict[str, Tensor]]]
"""From the model and a packed micro-batch to the loss summed over it and metrics summed over its rows."""

Reference = Callable[[Packed], Tensor]
"""From a packed micro-batch of R pairs to the reference log-probs [2R] of its completions, chosen first."""

PairLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`dpo.losses.preference_loss` of a cell: from policy, reference and lengths [R, 2] to losses and rewards."""


def sft_objective(model: torch.nn.Module, packed: Packed) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood in nats, summed over the completions of the micro-batch."""
    return nll_loss(model(packed=packed)), {}


def dpo_objective(
    model: torch.nn.Module, packed: Packed, *, loss: PairLoss, reference: Reference
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference loss summed over pairs, and the sums behind the metrics that TRL users know by these names.

    Args:
        model: the policy.
        packed: R pairs, chosen first.
        loss: of the cell that is trained.
        reference: of the 2R completions, in the order of `packed`.
    """
    policy = model(packed=packed).view(-1, 2)
    lengths = torch.tensor([lengths for _, lengths in packed["spans"]], device=policy.device)
    losses, rewards = loss(policy, reference(packed).to(policy.device).view(-1, 2), lengths)
    chosen_rewards, rejected_rewards = rewards.unbind(1)
    margins = chosen_rewards - rejected_rewards
    chosen, rejected = policy.detach().sum(0)
    return losses.sum(), {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).sum(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def cached_reference(table: Mapping[str, tuple[float, float]], rows: Sequence[TokenRow]) -> Reference:
    """Reference log-probs looked up by pair id.

    Raises:
        KeyError: a row has no reference log-probs.
    """
    missing = [row.id for row in rows if row.id not in table]
    if missing:
        raise KeyError(f"no reference log-probs for {len(missing)} pairs, the first is {missing[0]!r}")
    return lambda packed: torch.tensor([table[i] for i in packed["ids"]], dtype=torch.float32).flatten()


def online_reference(model: PreTrainedModel, *, lora: bool) -> Reference:
    """Reference log-probs computed when asked for: by `model` with its adapters off, or by a copy made now."""
    frozen = model if lora else copy.deepcopy(model).eval()

    @torch.no_grad()
    def answer(packed: Packed) -> Tensor:
        if not lora:
            return frozen(packed=packed)
        frozen.disable_adapters()
        try:
            return frozen(packed=packed)
        finally:
            frozen.enable_adapters()

    return answer


def add_lora(model: PreTrainedModel, params: LoraParams) -> None:
    """Freeze `model` and put a trainable low-rank update beside every linear layer but the output, in place."""
    from peft import LoraConfig

    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    model.add_adapter(config)
    config.target_modules = sorted(config.target_modules or ())  # a set: its order, and the saved file, would vary


class DivergenceAlarm(TrainerCallback):
    """Warns when the policy runs away from its reference, where a loss near 0 is no success."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Compare the mean log-ratios of a step with `ALARM_NATS`."""
        moved = [abs(logs.get(name, 0.0)) / self.beta for name in ("rewards/chosen", "rewards/rejected")]
        if max(moved) > ALARM_NATS:
            log.warning(
                "step %d: the policy runs away from its reference: log-probs of chosen moved by %.0f nats, "
                "of rejected by %.0f, margin %.3g, loss %.3g; lower the learning rate or raise beta",
                *(state.global_step, *moved, logs["rewards/margins"], logs["loss"]),
            )


class EarlyStop(TrainerCallback):
    """Ends the training after some validations without a new best, and puts the best weights back."""

    def __init__(self, model: PreTrainedModel, patience: int) -> None:
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.patience, self.waited, self.best = patience, 0, math.inf
        self.weights: list[Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they are the best so far."""
        self.waited += 1
        if metrics["eval_loss"] < self.best:
            self.best, self.waited = metrics["eval_loss"], 0
            self.weights = [parameter.detach().clone() for parameter in self.trained]
        control.should_training_stop |= self.waited >= self.patience

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the best weights back."""
        for parameter, best in zip(self.trained, self.weights, strict=False):
            parameter.copy_(best)


class PackedTrainer(Trainer):
    """A Trainer whose steps hold an exact number of rows, in packed micro-batches under a token budget."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        rows: Sequence[TokenRow],
        sampler: StepSampler,
        objective: Objective,
        loss_per: str,
        validation: Sequence[TokenRow],
        callbacks: list[TrainerCallback],
    ) -> None:
        """`loss_per` is the unit that the mean loss is taken over: `ids` (pairs) or `targets` (tokens)."""
        super().__init__(model, args, train_dataset=rows, eval_dataset=validation, callbacks=callbacks)
        self.sampler, self.objective, self.loss_per = sampler, objective, loss_per
        self.sums: dict[str, float] = defaultdict(float)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of packed rows, in the sampler's order."""
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=pack,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of one step, with the number of units that its mean loss is taken over."""
        batches, _ = super().get_batch_samples(*args)
        return batches, sum(len(batch[self.loss_per]) for batch in batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the step's mean loss."""
        loss, sums = self.objective(model, inputs)
        if not loss.isfinite():
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}, in the micro-batch of the pairs "
                f"{', '.join(inputs['ids'])}; training stops and saves nothing. Lower the learning rate."
            )
        for name, value in sums.items():
            self.sums[name] += value.item()
        self.sums["rows"] += len(inputs["ids"])
        return loss / num_items_in_batch

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss of the validation rows, as `eval_loss`."""
        total, units = 0.0, 0
        for packed in packed_batches(self.eval_dataset, self.sampler.tokens_per_batch, self.args.device):
            total += self.objective(self.model, packed)[0].item()
            units += len(packed[self.loss_per])
        metrics = {"eval_loss": total / units}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # writes to control
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means over the pairs seen since the last entry."""
        rows = self.sums.pop("rows", 0.0)
        if rows:
            logs |= {name: value / rows for name, value in self.sums.items()}
        self.sums.clear()
        super().log(logs, *args, **kwargs)


def train_sft(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    params: SftParams,
    *,
    tokens_per_batch: int,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Fine-tune `model` in place on the completions of `rows`; returns one log entry a step.

    The loss is the mean over the completion tokens of each step, prompts excluded.
    """
    rate = params.learning_rate
    return _train(model, rows, params, rate, sft_objective, "targets", tokens_per_batch, seed, callbacks)


def train_dpo(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    reference: Mapping[str, tuple[float, float]],
    params: DpoParams,
    cell: Cell,
    losses: LossParams,
    *,
    tokens_per_batch: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train `model` in place on preference pairs; returns one log entry a step.

    Args:
        model: starts as the reference policy, from `dpo.logps.load_model`; gets adapters if `params.lora` is set.
        rows: token rows with the chosen completion first.
        reference: (chosen, rejected) reference log-probs of every row id; not read if `params.reference` is
            `online`.
        params: optimiser settings.
        cell: loss, beta, learning rate, and the seed that decides the order of pairs.
        losses: settings of the losses.
        tokens_per_batch: most tokens in one forward pass.
        callbacks: told of every log entry.

    Raises:
        KeyError: a row has no reference log-probs.
        InputError: the optimizer needs a GPU that is not there, or early stopping leaves no rows to train on.
        FloatingPointError: the loss is no longer finite; names step and pairs.
    """
    if params.reference == "online":
        answer = online_reference(model, lora=params.lora is not None)
    else:
        answer = cached_reference(reference, rows)
    if params.lora is not None:
        add_lora(model, params.lora)
    loss = functools.partial(preference_loss, beta=cell.beta, loss=cell.loss, settings=losses)
    objective = functools.partial(dpo_objective, loss=loss, reference=answer)
    callbacks = [DivergenceAlarm(cell.beta), *callbacks]
    return _train(
        model, rows, params, cell.learning_rate, objective, "ids", tokens_per_batch, cell.seed, callbacks,
        early_stop=params.early_stop,
    )  # fmt: skip


def _train(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    params: OptimizerParams,
    learning_rate: float,
    objective: Objective,
    loss_per: str,
    tokens_per_batch: int,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    early_stop: EarlyStopParams | None = None,
) -> list[dict[str, float]]:
    if "8bit" in params.optimizer and not torch.cuda.is_available():
        raise InputError(f"params.yaml: optimizer '{params.optimizer}' needs a CUDA GPU; choose adamw or rmsprop")
    set_seed(seed)
    validation: list[TokenRow] = []
    if early_stop is not None:
        rows, validation = _hold_out(rows, early_stop.validation_share)
        callbacks = [*callbacks, EarlyStop(model, early_stop.patience)]
    if params.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sampler = StepSampler(
        [row.tokens for row in rows],
        rows_per_step=params.pairs_per_step,
        tokens_per_batch=tokens_per_batch,
        epochs=params.epochs,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=params.epochs,
            gradient_accumulation_steps=sampler.accumulation,
            learning_rate=learning_rate,
            optim=OPTIMIZERS[params.optimizer],
            lr_scheduler_type=params.schedule,
            warmup_steps=params.warmup_steps,
            max_grad_norm=params.max_grad_norm,
            weight_decay=0.0,
            seed=seed,
            save_strategy="no",
            eval_strategy="no" if early_stop is None else "steps",
            eval_steps=None if early_stop is None else early_stop.every_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=False,
        )
        trainer = PackedTrainer(model, args, rows, sampler, objective, loss_per, validation, list(callbacks))
        trainer.train()
    model.eval()
    steps: dict[float, dict[str, float]] = defaultdict(dict)
    for entry in trainer.state.log_history:
        if "loss" in entry or "eval_loss" in entry:
            steps[entry["step"]] |= entry
    return list(steps.values())


def _hold_out(rows: Sequence[TokenRow], share: float) -> tuple[list[TokenRow], list[TokenRow]]:
    """Rows to train on and rows to validate on, by a hash of their prompt: no prompt is on both sides."""
    sides: tuple[list[TokenRow], list[TokenRow]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(repr(row.prompt).encode()).digest()
        sides[int.from_bytes(digest[:4]) < share * 2**32].append(row)
    if not all(sides):
        raise InputError(
            f"params.yaml: dpo.early_stop.validation_share {share} of {len(rows)} pairs leaves no pairs to "
            f"{'validate' if sides[0] else 'train'} on; change it or bring more prompts"
        )
    return sides


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: Path, facts: Mapping[str, object]) -> None:
    """Write safetensors weights (with LoRA, the adapter alone) and tokenizer to `folder`, all or nothing.

    `facts`, what made the checkpoint, go into its `provenance.json`, with the SHA-256 of the weights.
    """
    with written_whole(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        weights = sha256(*sorted(aside.glob("*.safetensors")))
        write_json(aside / PROVENANCE, {**facts, "weights": weights})
