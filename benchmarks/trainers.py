"""Both sides' trainers: ours, and TRL's `DPOTrainer`. TRL is imported where it runs: ours must not carry it."""

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from benchmarks.cases import BETA, LORA, SEED, Case, arguments
from benchmarks.measure import Run, close, now, resident
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.packing import StepSampler, TokenRow
from dpo.training.loop import PackedTrainer
from dpo.training.losses import preference_loss
from dpo.training.schedule import Schedule
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora, cached_reference, dpo_objective

QUIET = {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
         "dataloader_pin_memory": False}  # fmt: skip
Reference = Mapping[str, tuple[float, float]]
"""(chosen, rejected) reference log-probs by row id."""


class Clock(TrainerCallback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(now())


def train(trainer: Trainer, case: Case, rows: Sequence[TokenRow], bare: float = math.nan) -> Run:
    """Run a trainer of either side."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return close(case, rows, clock.ends, losses, bare)


# Ours


class InOrder(StepSampler):
    """The rows in the order given, every step in `pairs_per_step / micro_batch` micro-batches."""

    def __init__(self, rows: Sequence[TokenRow], pairs_per_step: int, micro_batch: int) -> None:
        lengths = [row.tokens for row in rows]
        super().__init__(
            lengths, rows_per_step=pairs_per_step, max_tokens_per_microbatch=sum(lengths), epochs=1, seed=SEED
        )
        self.accumulation = pairs_per_step // micro_batch

    def _steps(self, epoch: int) -> list[list[int]]:
        return np.arange(len(self.lengths)).reshape(-1, self.rows_per_step).tolist()


def train_ours(case: Case, model: Path, rows: Sequence[TokenRow], reference: Reference) -> Run:
    """DPO with `dpo.training.train`'s trainer; bf16 is the engine's own, not the trainer's."""
    if case.lora:
        import peft  # noqa: F401
    bare = resident()
    policy = load_model(model, case.dtype, compiled=case.gpu)
    set_seed(SEED)
    if case.ours_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.lora:
        add_lora(policy.model, LoraSettings(rank=LORA["r"], alpha=LORA["lora_alpha"]))
    loss = functools.partial(preference_loss, beta=BETA, loss="sigmoid", settings=load_params().losses)
    objective = functools.partial(dpo_objective, loss=loss, reference=cached_reference(reference, rows))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, **arguments(case) | {"bf16": False}, **QUIET, remove_unused_columns=False)
        sampler, constant = InOrder(rows, case.pairs_per_step, case.micro_batch), Schedule("constant", 0.0)
        trainer = PackedTrainer(policy, args, rows, sampler, objective, "ids", [], False, constant, [])
        return train(trainer, case, rows, bare)


# The peer


def peer_trainer(
    case: Case, model: Path, rows: Sequence[TokenRow], folder: str, reference: Reference | None = None
) -> Any:
    """TRL's DPOTrainer on our tokens; batches, forward pass, loss and loop are its own.

    It takes `reference` for its precomputed log-probs; without, it computes them itself, timed in `ends`.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class Peer(DPOTrainer):
        ends: list[float]

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
            self.ends = []
            return dataset if reference else super()._precompute_ref_logps(dataset, *args)

        def compute_ref_log_probs(self, *args: Any) -> Any:
            logps = super().compute_ref_log_probs(*args)
            self.ends.append(now())
            return logps

    columns: dict[str, list[Any]] = {
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.completions[0] for row in rows],
        "rejected_ids": [row.completions[1] for row in rows],
    }
    if reference:
        columns["ref_chosen_logps"] = [reference[row.id][0] for row in rows]
        columns["ref_rejected_logps"] = [reference[row.id][1] for row in rows]
    args = DPOConfig(
        folder,
        **arguments(case),
        **QUIET,
        activation_checkpointing=case.checkpointing,
        use_liger_kernel=case.gpu,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = Dataset.from_dict(columns)
    lora = LoraConfig(**LORA) if case.lora else None
    return Peer(str(model), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def train_peer(case: Case, model: Path, rows: Sequence[TokenRow], reference: Reference) -> Run:
    """DPO with TRL's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        return train(peer_trainer(case, model, rows, folder, reference), case, rows)


def score_peer(case: Case, model: Path, rows: Sequence[TokenRow]) -> Run:
    """TRL's own reference pass, which its constructor runs."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, model, rows, folder)
        logps = [trainer.train_dataset[column] for column in ("ref_chosen_logps", "ref_rejected_logps")]
        return close(case, rows, trainer.ends, np.stack(logps, axis=1).flatten().tolist())
