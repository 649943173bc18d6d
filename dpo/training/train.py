"""SFT and DPO of a policy: what is trained, from which reference, with which settings."""

import functools
import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE, atomic_write, sha256, write_json
from dpo.engine.logprobs import LogProbModel
from dpo.engine.packing import PackedBatch, StepSampler, TokenRow
from dpo.training.checkpoints import Progress, last_checkpoint, training_key
from dpo.training.loop import (
    Cadence,
    DivergenceAlarm,
    EarlyStop,
    Objective,
    PackedTrainer,
    stopping_on_sigterm,
)
from dpo.training.losses import nll_loss, preference_loss
from dpo.training.schedule import Schedule
from dpo.training.settings import (
    DpoSettings,
    EarlyStopSettings,
    LoraSettings,
    LossSettings,
    OptimizerSettings,
    SftSettings,
    Trial,
)

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "rmsprop": "rmsprop",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}

Reference = Callable[[PackedBatch], Tensor]
"""From a packed micro-batch of R pairs to the reference log-probs [2R] of its completions, chosen first."""

PairLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From policy, reference and lengths [R, 2] to losses and rewards, as `dpo.training.losses.preference_loss`."""


def sft_objective(model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood in nats, summed over the completions of the micro-batch."""
    return nll_loss(model(batch)), {}


def dpo_objective(
    model: torch.nn.Module, batch: PackedBatch, *, loss: PairLoss, reference: Reference
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference loss summed over pairs, and the sums behind the metrics that TRL users know by these names.

    Args:
        model: the policy.
        batch: R pairs, chosen first.
        loss: of the trial that is trained.
        reference: of the 2R completions, in the order of `batch`.
    """
    policy = model(batch).view(-1, 2)
    lengths = torch.tensor([lengths for _, lengths in batch.layout], device=policy.device)
    before = reference(batch).to(policy.device).view(-1, 2)
    losses, rewards = loss(policy, before, lengths)
    chosen_rewards, rejected_rewards = rewards.unbind(1)
    margins = chosen_rewards - rejected_rewards
    chosen, rejected = policy.detach().sum(0)
    chosen_ratio, rejected_ratio = (policy.detach() - before).sum(0)
    return losses.sum(), {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": ((margins.sign() + 1) / 2).sum(),  # ties count one half
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logratios/chosen": chosen_ratio,
        "logratios/rejected": rejected_ratio,
    }


def cached_reference(table: Mapping[str, tuple[float, float]], rows: Sequence[TokenRow]) -> Reference:
    """Reference log-probs looked up by pair id.

    Raises:
        KeyError: a row has no reference log-probs.
    """
    missing = [row.id for row in rows if row.id not in table]
    if missing:
        raise KeyError(f"no reference log-probs for {len(missing)} pairs, the first is {missing[0]!r}")
    return lambda batch: torch.tensor([table[i] for i in batch.ids], dtype=torch.float32).flatten()


def add_lora(model: PreTrainedModel, params: LoraSettings) -> None:
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


def train_sft(
    model: LogProbModel,
    rows: Sequence[TokenRow],
    params: SftSettings,
    *,
    max_tokens_per_microbatch: int,
    seed: int,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Fine-tune `model` in place on the completions of `rows`; returns one log entry a step.

    The loss is the mean over the completion tokens of each step, prompts excluded. See `train_dpo` for the rest.
    """
    return _train(
        model, rows, params, sft_objective, "targets", learning_rate=params.learning_rate, seed=seed,
        max_tokens_per_microbatch=max_tokens_per_microbatch, progress=progress, callbacks=callbacks, decides={},
    )  # fmt: skip


def train_dpo(
    model: LogProbModel,
    rows: Sequence[TokenRow],
    reference: Mapping[str, tuple[float, float]],
    params: DpoSettings,
    trial: Trial,
    losses: LossSettings,
    *,
    max_tokens_per_microbatch: int,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train `model` in place on preference pairs; returns one log entry a step.

    Under `torch.distributed` all processes call this with the same arguments and share the work of each step.

    Args:
        model: the reference policy, from `dpo.engine.logprobs.load_model`; gets adapters if `params.lora` is set.
        rows: token rows with the chosen completion first.
        reference: (chosen, rejected) reference log-probs of every row id.
        params: optimiser settings.
        trial: loss, beta, learning rate, and the seed that decides the order of pairs.
        losses: settings of the losses.
        max_tokens_per_microbatch: most tokens in one forward pass.
        progress: where checkpoints lie. A training that was cut off goes on from its last one and ends with the
            same weights and log as one that was not, on a CPU bit for bit. None keeps no checkpoints.
        callbacks: told of every log entry.

    Raises:
        KeyError: a row has no reference log-probs.
        InputError: the optimizer needs a GPU that is not there, memory does not suffice for one pair, or early
            stopping leaves no rows to train on.
        FloatingPointError: loss or gradient is no longer finite, and `params.non_finite` is `stop`; names step
            and pairs.
        Stopped: SIGTERM came; a checkpoint has been written.
    """
    decides: dict[str, object] = {"trial": trial, "loss": getattr(losses, trial.loss)}
    answer = cached_reference(reference, rows)
    decides["reference"] = [reference[row.id] for row in rows]
    if params.lora is not None:
        set_seed(trial.seed)  # the adapters begin at random
        add_lora(model.model, params.lora)
    loss = functools.partial(preference_loss, beta=trial.beta, loss=trial.loss, settings=losses)
    return _train(
        model,
        rows,
        params,
        functools.partial(dpo_objective, loss=loss, reference=answer),
        "ids",
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        progress=progress,
        callbacks=[DivergenceAlarm(), *callbacks],
        decides=decides,
        early_stop=params.early_stop,
    )


def _train(
    model: LogProbModel,
    rows: Sequence[TokenRow],
    params: OptimizerSettings,
    objective: Objective,
    loss_per: str,
    *,
    learning_rate: float,
    seed: int,
    max_tokens_per_microbatch: int,
    progress: Progress | None,
    callbacks: Sequence[TrainerCallback],
    decides: Mapping[str, object],
    early_stop: EarlyStopSettings | None = None,
) -> list[dict[str, float]]:
    if "8bit" in params.optimizer and not torch.cuda.is_available():
        raise InputError(f"params.yaml: optimizer '{params.optimizer}' needs a CUDA GPU; choose adamw or rmsprop")
    set_seed(seed)
    everything = {**decides, "params": params, "learning_rate": learning_rate, "seed": seed}
    everything |= {"max_tokens_per_microbatch": max_tokens_per_microbatch, "precision": model.precision}
    validation: list[TokenRow] = []
    if early_stop is not None:
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise InputError(
                "params.yaml: dpo.early_stop does not work with sharded weights (FSDP); set it to null"
            )
        rows, validation = _hold_out(rows, early_stop.validation_share)
        callbacks = [*callbacks, EarlyStop(model.model, early_stop.patience)]
    if progress is not None:
        callbacks = [*callbacks, Cadence(progress.minutes)]
    if params.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    processes = this_process()
    sampler = StepSampler(
        [row.tokens for row in rows],
        rows_per_step=params.pairs_per_step,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        epochs=params.epochs,
        seed=seed,
        processes=processes.num_processes,
        process=processes.process_index,
    )
    with _folder(progress, model, rows, everything) as folder:
        args = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=params.epochs,
            gradient_accumulation_steps=sampler.accumulation,
            learning_rate=learning_rate,
            optim=OPTIMIZERS[params.optimizer],
            max_grad_norm=params.max_grad_norm,
            weight_decay=0.0,
            seed=seed,
            use_cpu=processes.device.type == "cpu",
            save_strategy="no",
            eval_strategy="no" if early_stop is None else "steps",
            eval_steps=None if early_stop is None else early_stop.every_steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            disable_tqdm=False,
        )
        args._n_gpu = min(args.n_gpu, 1)  # the Trainer would cut a packed stream up for the GPUs of one process
        skip = params.non_finite == "skip"
        schedule = Schedule(params.schedule, params.warmup_ratio)
        trainer = PackedTrainer(
            model, args, rows, sampler, objective, loss_per, validation, skip, schedule, list(callbacks)
        )
        if trainer.accelerator.mixed_precision != "no":
            raise InputError(
                "run.launch: mixed_precision must be 'no' there; engine.precision in params.yaml decides"
            )
        with processes.main_process_first():
            checkpoint = last_checkpoint(folder)
        with stopping_on_sigterm(trainer):
            trainer.train(None if checkpoint is None else str(checkpoint))
    model.eval()
    steps: dict[float, dict[str, float]] = defaultdict(dict)
    for entry in trainer.state.log_history:
        if "loss" in entry or "eval_loss" in entry:
            steps[entry["step"]] |= entry
    return [dict(sorted(step.items())) for step in steps.values()]  # as those that a checkpoint brought


@contextmanager
def _folder(
    progress: Progress | None, model: LogProbModel, rows: Sequence[TokenRow], decides: Mapping[str, object]
) -> Iterator[Path]:
    """The folder of this training: the one that earlier tries of it used, if progress is kept."""
    if progress is not None:
        with this_process().main_process_first():
            folder = progress.folder(training_key(model.model, rows, decides))
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


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


def save_checkpoint(policy: LogProbModel, tokenizer: Any, folder: Path, facts: Mapping[str, object]) -> None:
    """Write safetensors weights (with LoRA, the adapter alone) and tokenizer to `folder`, all or nothing.

    Under `torch.distributed` all processes call this; the first gathers the weights of the others and writes.
    `facts`, what made the checkpoint, go into its `provenance.json`, with the SHA-256 of the weights.
    """
    model = policy.model
    weights = dict(model.named_parameters())  # tied ones once
    state = None
    if any(isinstance(weight, DTensor) for weight in weights.values()):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options)
        state = {name: value for name, value in whole.items() if name in weights}
    if this_process().is_main_process:
        with atomic_write(folder) as tmp:
            model.save_pretrained(tmp, state_dict=state)
            tokenizer.save_pretrained(tmp)
            digest = sha256(*sorted(tmp.glob("*.safetensors")))
            write_json(tmp / PROVENANCE, {**facts, "weights": digest})
    this_process().wait_for_everyone()
