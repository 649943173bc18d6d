"""The two sides of the benchmark: our training loop, and TRL's `DPOTrainer`, imported only where it runs."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from benchmarks.cases import BETA, LORA, SEED, TRAINING, Case, arguments
from benchmarks.engine import load_ours
from benchmarks.measure import Run, close, now, reset_peak, resident
from dpo.engine.frozen import nf4_options
from dpo.engine.reference_cache import ReferenceLogps
from dpo.engine.tokenization import TokenRow
from dpo.training.callbacks import Callback
from dpo.training.loop import TrainingLoop
from dpo.training.losses import Sigmoid
from dpo.training.objectives import DpoObjective, cached_reference
from dpo.training.sampler import StepSampler
from dpo.training.settings import LoraSettings, OptimizerSettings
from dpo.training.train import add_lora

QUIET = {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
         "dataloader_pin_memory": False}  # fmt: skip
Reference = Mapping[str, tuple[float, float]]
"""Reference log-probs (chosen, rejected) by row id."""


class Clock(Callback):
    """Records the time after every step of our training loop."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_start(self, step: int, history: list[dict[str, float]]) -> None:
        """Start to measure memory."""
        reset_peak()

    def on_log(self, entry: dict[str, float]) -> None:
        """Record the time."""
        if "loss" in entry:
            self.ends.append(now())


class PeerClock(TrainerCallback):
    """Records the time after every step of TRL's trainer."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start to measure memory."""
        reset_peak()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.ends.append(now())


# Ours


class InOrder(StepSampler):
    """Rows in their order, with `pairs_per_step / micro_batch` micro-batches per step."""

    def __init__(self, rows: Sequence[TokenRow], pairs_per_step: int, micro_batch: int) -> None:
        lengths = [row.tokens for row in rows]
        super().__init__(
            lengths, rows_per_step=pairs_per_step, max_tokens_per_microbatch=sum(lengths), epochs=1, seed=SEED
        )
        self.accumulation = pairs_per_step // micro_batch

    def _steps(self, epoch: int) -> list[list[int]]:
        return np.arange(len(self.lengths)).reshape(-1, self.rows_per_step).tolist()


def train_ours(case: Case, model: Path, rows: Sequence[TokenRow], reference: Reference) -> Run:
    """Train with our loop. The engine sets the precision."""
    if case.lora:
        import peft  # noqa: F401
    bare = resident()
    policy = load_ours(case, model, frozen=False)
    set_seed(SEED)
    if case.ours_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.lora:
        add_lora(policy.model, LoraSettings(rank=LORA["r"], alpha=LORA["lora_alpha"]))
    policy.hold_frozen_weights()
    settings = OptimizerSettings(
        epochs=1,
        pairs_per_step=case.pairs_per_step,
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=TRAINING["max_grad_norm"],
    )
    objective, clock = (
        DpoObjective(Sigmoid(), BETA, cached_reference(ReferenceLogps.of(reference), [row.id for row in rows])),
        Clock(),
    )
    sampler = InOrder(rows, case.pairs_per_step, case.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        log = TrainingLoop(
            policy, objective, rows, sampler, settings, TRAINING["learning_rate"], Path(folder), callbacks=[clock]
        ).run()
    return close(case, rows, _timed(case, rows, clock.ends), [entry["loss"] for entry in log], bare)


def _timed(case: Case, rows: Sequence[TokenRow], ends: list[float]) -> list[float]:
    """Return the ends of the steps from that of the warm-up."""
    return ends[case.warm_up(rows) // case.pairs_per_step - 1 :]


# The peer


def peer_trainer(
    case: Case, model: Path, rows: Sequence[TokenRow], folder: str, reference: Reference | None = None
) -> Any:
    """Return TRL's DPOTrainer on our tokens, with its own batches, forward pass, loss and loop.

    Weights that are not trained are in bf16 under bf16. If `reference` is None, the trainer
    computes the reference log-probs and records the times in `ends`.
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
            reset_peak()
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
    is_frozen = case.lora or not case.train
    args = DPOConfig(
        folder,
        model_init_kwargs={"dtype": "bfloat16"} if case.dtype == "bf16" and is_frozen else None,
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
    return Peer(
        str(model),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        quantization_config=_nf4() if case.quantization else None,
    )


def _nf4() -> Any:
    """Return the quantization of the engine, with products in bf16."""
    config = nf4_options()["quantization_config"]
    config.bnb_4bit_compute_dtype = torch.bfloat16
    return config


def train_peer(case: Case, model: Path, rows: Sequence[TokenRow], reference: Reference) -> Run:
    """Train with TRL's trainer."""
    clock = PeerClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, model, rows, folder, reference)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return close(case, rows, _timed(case, rows, clock.ends), losses)


def score_peer(case: Case, model: Path, rows: Sequence[TokenRow]) -> Run:
    """Run TRL's own reference pass, which is part of its constructor."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, model, rows, folder)
        logps = [trainer.train_dataset[column] for column in ("ref_chosen_logps", "ref_rejected_logps")]
        return close(case, rows, _timed(case, rows, trainer.ends), np.stack(logps, axis=1).flatten().tolist())
