"""The training loop: forward, backward, clip, guard, step, log, validate, checkpoint.

Training survives SIGKILL and SIGTERM (it resumes from the last checkpoint and reaches the same weights),
out-of-memory errors, and a full disk under its checkpoints. A non-finite loss or gradient changes no weight.
"""

import json
import logging
import math
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dpo.common.errors import InputError, Stopped
from dpo.common.files import atomic_write, write_json
from dpo.common.progress import progress
from dpo.engine.flops import cost_of
from dpo.engine.logprobs import LogProbModel, packed_batches
from dpo.engine.packing import pack
from dpo.engine.pretrained import has_adapter
from dpo.engine.sharding import release
from dpo.engine.tokenization import TokenRow
from dpo.training.callbacks import Callback, EarlyStop
from dpo.training.checkpoints import CHECKSUMS, NON_FINITE, last_checkpoint, write_checksums
from dpo.training.objectives import Objective
from dpo.training.offload import offloaded_activations
from dpo.training.optimizers import create_optimizer, schedule_factor
from dpo.training.routers import RouterLoss
from dpo.training.sampler import StepSampler, balance
from dpo.training.settings import EarlyStopSettings, OptimizerSettings

WEIGHTS, BEST = "trained.safetensors", "best.safetensors"
OPTIMIZER, HISTORY = "optimizer.pt", "history.json"
SHARDS, TRAINED = "shards", StateDictOptions(ignore_frozen_params=True)

Rows = Sequence[TokenRow]

log = logging.getLogger(__name__)


@torch.no_grad()
def copy_into(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy `values` into the weights of the same names."""
    for name, value in values.items():
        weights[name].copy_(value)


@dataclass(frozen=True)
class Segment:
    """A part of a longer training. It carries on the learning rate schedule and the state of the optimizer."""

    start: int
    """Number of steps in the parts before it."""
    steps: int
    """Number of steps in this part."""
    total: int
    """Number of steps in all parts."""
    before: Path | None
    """Optimizer state at the end of the part before it."""
    after: Path
    """Where the optimizer state is written at the end of this part."""


@dataclass(eq=False)
class TrainingLoop:
    """Trains a model in place, in one process or in each of the processes of `accelerate launch`.

    `checkpoint_minutes` is the time between two checkpoints in `folder`. If it is infinite, only an interruption
    writes one. `validation` has the rows for early stopping.
    """

    model: LogProbModel
    objective: Objective
    rows: Rows
    sampler: StepSampler
    settings: OptimizerSettings
    learning_rate: float
    folder: Path
    _: KW_ONLY
    checkpoint_minutes: float = math.inf
    early_stop_settings: EarlyStopSettings | None = None
    validation: Rows = ()
    callbacks: Sequence[Callback] = ()
    segment: Segment | None = None

    def __post_init__(self) -> None:
        self.accelerator = Accelerator()
        if self.accelerator.mixed_precision != "no":
            raise InputError(
                "run.launch: mixed_precision must be 'no' in this file; engine.precision in params.yaml sets it"
            )
        self.sharded = self.model.sharded
        model = self.model.model
        self.config, self.lora = model.config, has_adapter(model)
        self.model.accumulate_in_place = self.accelerator.num_processes == 1
        self.router_loss = RouterLoss(self.model) if self.settings.router_aux_loss else None
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not self.sharded:
            self.model.to(self.accelerator.device)
        self.optimizer = create_optimizer(self.settings.optimizer, self.model, self.sampler.seed)
        if not self.sharded:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.early_stop = self.early_stop_settings and EarlyStop(self.early_stop_settings, self.weights)
        self.history: list[dict[str, float]] = []
        self.steps = self.sampler.epochs * -(-len(self.rows) // self.sampler.rows_per_step)
        self.first_step, self.schedule_steps = 0, self.steps
        if self.segment:
            self.steps = min(self.steps, self.segment.steps)
            self.first_step, self.schedule_steps = self.segment.start, self.segment.total
        self.parts = 1
        self.offloads = self.settings.gradient_checkpointing == "offload"
        self.skipped = self.stop_requested = False

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return len(self.history)

    def run(self) -> list[dict[str, float]]:
        """Train until the last step or until early stopping, and return one log entry per step."""
        self._resume()
        for callback in self.callbacks:
            callback.on_start(self.step, self.history)
        started = saved = time.monotonic()
        self.model.train()
        bar = progress(
            total=self.steps, initial=self.step, desc="training", unit="step",
            disable=not self.accelerator.is_main_process,
        )  # fmt: skip
        # Several processes do not stop, because they would save at different micro-batches.
        alone = self.accelerator.num_processes == 1
        with bar, self.router_loss or nullcontext(), self._stopping_on_sigterm() if alone else nullcontext():
            for groups, epoch in self._remaining_steps():
                entry = {**self._train_step(groups), "epoch": epoch, "step": self.first_step + self.step + 1}
                if self.early_stop and entry["step"] % self.early_stop.settings.every_steps == 0:
                    entry |= self._validate()
                    self.early_stop.update(entry["eval_loss"])
                self.history.append(dict(sorted(entry.items())))
                for callback in self.callbacks:
                    callback.on_log(self.history[-1])
                bar.update()
                if self.step == self.steps or (self.early_stop and self.early_stop.finished):
                    break  # a checkpoint of the last step would not know that training has ended
                due = torch.tensor(
                    time.monotonic() - saved >= 60 * self.checkpoint_minutes, device=self.accelerator.device
                )
                if broadcast(due):  # the main process decides
                    self._save()
                    saved = time.monotonic()
        if self.early_stop:
            copy_into(self.weights, self.early_stop.best)
        for callback in self.callbacks:
            callback.on_log({"step": self.first_step + self.step, "train_runtime": time.monotonic() - started})
            callback.on_end()
        if self.segment and self.accelerator.is_main_process:
            with atomic_write(self.segment.after) as tmp:
                torch.save(self.optimizer.state_dict(), tmp)
        return self.history

    def _remaining_steps(self) -> Iterator[tuple[list[Rows], float]]:
        """Yield the rows of each micro-batch of a step, and the number of epochs after it."""
        for epoch in range(self.sampler.epochs):
            steps = self.sampler.steps(epoch)
            total, done = sum(map(len, steps)), 0
            for number, groups in enumerate(steps, epoch * len(steps)):
                done += len(groups)
                if number >= self.step:
                    yield [[self.rows[i] for i in group] for group in groups], epoch + done / total

    def _train_step(self, groups: list[Rows]) -> dict[str, float]:
        """Change the weights by one optimizer step, and return its log entry."""
        decay, warmup_ratio = self.settings.schedule, self.settings.warmup_ratio
        place = self.first_step + self.step
        learning_rate = self.learning_rate * schedule_factor(decay, warmup_ratio, place, self.schedule_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.skipped = False
        loss, sums = self._accumulate_gradients(groups)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm).item()
        if not (math.isfinite(norm) or self.skipped):
            self._handle_non_finite(f"the gradient norm is {norm}", [row for group in groups for row in group])
        parts = gather_object([{**sums, "loss": loss, "skipped": self.skipped}])
        totals = {name: sum(part[name] for part in parts) for name in parts[0]}
        rows, loss, skipped = (totals.pop(name) for name in ("rows", "loss", "skipped"))
        counts = {name: totals.pop(name) for name in ("tokens", "flops") if name in totals}
        if not skipped:
            self.optimizer.step()
        self.model.zero_grad()
        metrics = {name: value / rows for name, value in totals.items()} if rows else {}
        loss = math.nan if skipped else loss / len(parts)
        return {**metrics, **counts, "loss": loss, "grad_norm": norm, "learning_rate": learning_rate}

    def _accumulate_gradients(self, groups: list[Rows]) -> tuple[float, dict[str, float]]:
        """Run the forward and backward passes of a step, in smaller micro-batches after an out-of-memory error."""
        while True:
            try:
                return self._forward_backward([part for group in groups for part in self._split(group)])
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or self.accelerator.num_processes > 1:
                    raise
            # Repeat the step outside of the handler, whose traceback would keep the tensors of the failed pass.
            if self.parts >= max(map(len, groups)):
                raise InputError(
                    f"params.yaml: engine.max_length: step {self.step + 1}: not enough memory for one pair; lower "
                    "it, set gradient_checkpointing: true, or train with dpo.lora"
                )
            self.parts *= 2
            log.warning(
                "step %d: out of memory; from now on each micro-batch is computed in %d parts, with the same "
                "result; to start with smaller micro-batches, lower engine.max_tokens_per_microbatch in "
                "params.yaml",
                *(self.step + 1, self.parts),
            )
            self.model.zero_grad()  # the failed pass has left a partial gradient
            clear_device_cache(garbage_collection=True)

    def _forward_backward(self, groups: list[Rows]) -> tuple[float, dict[str, float]]:
        """Return the mean loss of the step in this process, and the sums of its metrics."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        # If a short step leaves this process without rows, compute a placeholder with weight 0.
        batches = [pack(rows or self.rows[:1]).to(device) for rows in groups]
        weights = [int(bool(rows)) for rows in groups]
        counted = torch.tensor(sum(self.objective.units(row) for rows in groups for row in rows), device=device)
        units = self.accelerator.reduce(counted).item() / processes  # gradients are averaged over processes
        self.objective.begin_step(self.model, batches, weights)
        total, sums = torch.zeros((), device=device), defaultdict[str, float](float)
        for number, (batch, weight, rows) in enumerate(zip(batches, weights, groups, strict=True), 1):
            if self.stop_requested:
                self._save()
                raise Stopped(f"stopped after step {self.step} of {self.steps}")
            # FSDP reduces the gradients of each micro-batch. Otherwise each process would hold all of them.
            synced = self.sharded or number == len(groups)
            with nullcontext() if synced else self.accelerator.no_sync(self.model):
                with offloaded_activations(self.model) if self.offloads else nullcontext():
                    loss, metrics = self.objective(self.model, batch)
                    if self.router_loss:  # weighted as the rows of the micro-batch
                        metrics["router_aux_loss"] = self.router_loss.value.detach() * len(rows)
                        own = sum(map(self.objective.units, rows))
                        loss = loss + self.settings.router_aux_loss * own * self.router_loss.value
                finite = bool(loss.isfinite())
                if not finite:
                    self._handle_non_finite(f"the loss is {loss.item()}", rows)
                for name, value in metrics.items():
                    sums[name] += value.item() if finite and rows else 0.0
                sums["rows"] += len(rows) if finite else 0
                share = loss * weight / units
                self.accelerator.backward(share)
            total += share.detach()
        step, extra = [row for rows in groups for row in rows], self.objective.extra_passes
        cost = cost_of(step, self.config, "trained", lora=self.lora, extra_passes=extra)
        sums["tokens"] = cost.trained_tokens
        if cost.flops is not None:
            sums["flops"] = cost.flops
        return total.item(), dict(sums)

    def _split(self, rows: Rows) -> list[Rows]:
        parts = balance(range(len(rows)), [row.tokens for row in rows], self.parts)
        return [[rows[i] for i in part] for part in parts] or [rows]

    def _handle_non_finite(self, what: str, rows: Rows) -> None:
        """Save the rows of a step with a non-finite loss or gradient, then stop training or skip the step."""
        step, process = self.step + 1, self.accelerator.process_index
        file = self.folder / f"{NON_FINITE}step-{step}-process-{process}.json"
        write_json(file, {"step": step, "fault": what, "rows": [row.to_json() for row in rows]})
        ids = ", ".join(row.id for row in rows)
        message = f"step {step}: {what}, from the pairs {ids}; their tokens are in {file}"
        if self.settings.non_finite == "skip":
            self.skipped = True
            log.warning("%s; the step is skipped", message)
            return
        if self.accelerator.num_processes == 1:
            self._save()
        raise FloatingPointError(
            f"{message}; training stops before this step and saves no policy. Lower the learning rate, or set "
            "non_finite: skip in params.yaml. If nothing changes, the next run resumes at this step"
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Return the mean loss and metrics of the validation rows."""
        budget, sums = self.sampler.max_tokens_per_microbatch, defaultdict[str, float](float)
        batches = list(packed_batches(self.validation, budget, self.accelerator.device))
        self.objective.begin_step(self.model, batches, [1] * len(batches))
        for batch in batches:
            loss, metrics = self.objective(self.model, batch)
            for name, value in ({"loss": loss} | metrics).items():
                sums[f"eval_{name}"] += value.item()
        if self.sharded:
            release(self.model.model)
        units = sum(map(self.objective.units, self.validation))
        return {name: total / units for name, total in sums.items()}

    def _save(self) -> None:
        """Write a checkpoint of the last step. If this fails, as on a full disk, training continues without it."""
        checkpoint, is_main = self.folder / f"checkpoint-{self.step}", self.accelerator.is_main_process
        if (checkpoint / CHECKSUMS).exists():
            return
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            if self.sharded:
                save(self._shards(), checkpoint_id=checkpoint / SHARDS)
            elif is_main:
                save_file(self.weights, checkpoint / WEIGHTS)
                torch.save(self.optimizer.state_dict(), checkpoint / OPTIMIZER)
                if self.early_stop:
                    save_file(self.early_stop.best, checkpoint / BEST)
            if is_main:
                (checkpoint / HISTORY).write_text(json.dumps(self.history))
            self.accelerator.wait_for_everyone()
            if is_main:
                write_checksums(checkpoint)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            log.warning("%s could not be written (%s); training continues without it", checkpoint, error)
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _resume(self) -> None:
        """Load the last valid checkpoint, if there is one."""
        with self.accelerator.main_process_first():
            checkpoint = last_checkpoint(self.folder)
        if checkpoint is None:
            if self.segment and self.segment.before:
                self._load_optimizer(self.segment.before)
            return
        self.history = json.loads((checkpoint / HISTORY).read_text())
        if self.early_stop:
            for entry in self.history:
                if "eval_loss" in entry:
                    self.early_stop.update(entry["eval_loss"])
        if self.sharded:
            shards = self._shards()
            load(shards, checkpoint_id=checkpoint / SHARDS)
            set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"], options=TRAINED)
            return
        copy_into(self.weights, load_file(checkpoint / WEIGHTS))
        self._load_optimizer(checkpoint / OPTIMIZER)
        if self.early_stop:
            self.early_stop.best = load_file(checkpoint / BEST)

    def _shards(self) -> dict[str, Any]:
        """Return the shards of the trained weights and of the optimizer states, to save or to load in place."""
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=TRAINED)
        best = self.early_stop.best if self.early_stop else {}
        return {"weights": self.weights, "optimizer": optimizer, "best": best}

    def _load_optimizer(self, file: Path) -> None:
        self.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @contextmanager
    def _stopping_on_sigterm(self) -> Iterator[None]:
        """Inside the block, save a checkpoint and raise Stopped at the next micro-batch after SIGTERM."""

        def request(*_: object) -> None:
            self.stop_requested = True

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
