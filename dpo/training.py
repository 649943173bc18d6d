"""SFT and DPO under `transformers.Trainer`: our batches and our loss, its loop."""

import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from dpo.batching import StepSampler, TokenRow, pack
from dpo.config import DpoParams, OptimizerParams, SftParams
from dpo.files import written_whole
from dpo.losses import dpo_loss, nll_loss

OPTIMIZERS = {"adamw": "adamw_torch_fused", "rmsprop": "rmsprop"}

Objective = Callable[[Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]
"""From log-probs [C] of the packed completions and the row ids [R] to the loss summed over the micro-batch and
metrics summed over its rows."""


def sft_objective(logps: Tensor, ids: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood in nats, summed over the completions of the micro-batch."""
    return nll_loss(logps), {}


def dpo_objective(
    logps: Tensor, ids: Sequence[str], *, beta: float, reference: Mapping[str, tuple[float, float]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO loss (eq. 7) summed over pairs, and the sums behind the metrics that TRL users know by these names.

    Args:
        logps: [2R], chosen and rejected of each pair in turn.
        ids: the R pair ids.
        beta: strength of the KL constraint.
        reference: (chosen, rejected) reference log-probs of each pair id.
    """
    chosen, rejected = logps.view(-1, 2).unbind(1)
    cached = torch.tensor([reference[i] for i in ids], dtype=torch.float32, device=logps.device)
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, cached[:, 0], cached[:, 1], beta)
    margins = chosen_rewards - rejected_rewards
    return losses.sum(), {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).sum(),
        "logps/chosen": chosen.detach().sum(),
        "logps/rejected": rejected.detach().sum(),
    }


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
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """`loss_per` is the unit that the mean loss is taken over: `ids` (pairs) or `targets` (tokens)."""
        super().__init__(model, args, train_dataset=rows, callbacks=callbacks)
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
        loss, sums = self.objective(model(packed=inputs), inputs["ids"])
        for name, value in sums.items():
            self.sums[name] += value.item()
        self.sums["rows"] += len(inputs["ids"])
        return loss / num_items_in_batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means over the pairs seen since the last entry."""
        rows = self.sums.pop("rows", 0.0)
        if "loss" in logs and rows:
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
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, float]]:
    """Fine-tune `model` in place on the completions of `rows`; returns one log entry a step.

    The loss is the mean over the completion tokens of each step, prompts excluded.
    """
    return _train(model, rows, params, sft_objective, "targets", tokens_per_batch, seed, callbacks)


def train_dpo(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    reference: Mapping[str, tuple[float, float]],
    params: DpoParams,
    beta: float,
    *,
    tokens_per_batch: int,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, float]]:
    """Optimise `model` in place on preference pairs; returns one log entry a step.

    Args:
        model: starts as the reference policy, from `dpo.logps.load_model`.
        rows: token rows with the chosen completion first.
        reference: (chosen, rejected) reference log-probs of every row id.
        params: optimiser settings.
        beta: strength of the KL constraint.
        tokens_per_batch: most tokens in one forward pass.
        seed: decides the order of pairs.
        callbacks: told of every log entry.

    Raises:
        KeyError: a row has no reference log-probs.
    """
    missing = [row.id for row in rows if row.id not in reference]
    if missing:
        raise KeyError(f"no reference log-probs for {len(missing)} pairs, the first is {missing[0]!r}")
    objective = functools.partial(dpo_objective, beta=beta, reference=reference)
    return _train(model, rows, params, objective, "ids", tokens_per_batch, seed, callbacks)


def _train(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    params: OptimizerParams,
    objective: Objective,
    loss_per: str,
    tokens_per_batch: int,
    seed: int,
    callbacks: list[TrainerCallback] | None,
) -> list[dict[str, float]]:
    set_seed(seed)
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
            learning_rate=params.learning_rate,
            optim=OPTIMIZERS[params.optimizer],
            lr_scheduler_type=params.schedule,
            warmup_steps=params.warmup_steps,
            max_grad_norm=params.max_grad_norm,
            weight_decay=0.0,
            seed=seed,
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=False,
        )
        trainer = PackedTrainer(model, args, rows, sampler, objective, loss_per, callbacks)
        trainer.train()
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def save_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write safetensors weights and tokenizer to `folder`, all or nothing."""
    with written_whole(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
