"""`transformers.Trainer` with our batches and our loss: its loop, its optimizers, its way to many devices.

A training outlives what stops others: a kill (it goes on from its last checkpoint, to the same weights), a request
to stop, too little memory for a step, a full disk under its checkpoints. A loss or gradient that is not finite
never reaches the weights.
"""

import functools
import itertools
import logging
import math
import shutil
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from dpo.common.errors import InputError, Stopped
from dpo.common.files import write_json
from dpo.engine.logprobs import LogProbModel, packed_batches
from dpo.engine.packing import PackedBatch, StepSampler, TokenRow, balance, pack
from dpo.training.checkpoints import REPLAY, SEAL, seal
from dpo.training.schedule import Schedule

ALARM_NATS = 100.0
"""Mean change of a completion's log-prob that a sound run does not reach: a factor of e^100 in its probability."""

ALARM_GRADIENT = 100.0
"""Ratio of a gradient norm to the median of the `ALARM_STEPS` before it that a sound run does not reach."""

ALARM_STEPS = 100
"""Earlier steps whose gradient norms a step is compared with."""

TRAINED, BEST = "trained.safetensors", "best.safetensors"

log = logging.getLogger(__name__)

Packed = dict[str, Any]
"""`batch`: a `PackedBatch`; `weight`: 0 if its loss does not count."""

Objective = Callable[[torch.nn.Module, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""From the model and a packed micro-batch to the loss summed over it and metrics summed over its rows."""


class DivergenceAlarm(TrainerCallback):
    """Warns when the policy runs away from its reference, where a loss near 0 is no success."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Compare the mean log-ratios of a step with `ALARM_NATS`, its gradient with `ALARM_GRADIENT`."""
        moved = [abs(logs.get(name, 0.0)) for name in ("logratios/chosen", "logratios/rejected")]
        if max(moved) > ALARM_NATS:
            log.warning(
                "step %d: the policy runs away from its reference: log-probs of chosen moved by %.0f nats, "
                "of rejected by %.0f, margin %.3g, loss %.3g; lower the learning rate or raise beta",
                *(state.global_step, *moved, logs["rewards/margins"], logs["loss"]),
            )
        norms = (entry["grad_norm"] for entry in reversed(state.log_history) if "grad_norm" in entry)
        _, *earlier = itertools.islice(norms, ALARM_STEPS + 1) if "grad_norm" in logs else [None]
        if len(earlier) >= 5:
            usual = statistics.median(earlier)
            if logs["grad_norm"] > ALARM_GRADIENT * usual:
                log.warning(
                    "step %d: the gradient norm is %.3g, %.0f times the median of the steps before; look at "
                    "the pairs of this step, lower the learning rate or max_grad_norm",
                    *(state.global_step, logs["grad_norm"], logs["grad_norm"] / usual),
                )


class EarlyStop(TrainerCallback):
    """Ends the training after some validations without a new best, and puts the best weights back."""

    def __init__(self, model: PreTrainedModel, patience: int) -> None:
        self.trained = trained_weights(model)
        self.patience, self.waited, self.best = patience, 0, math.inf
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they are the best so far."""
        self.waited += 1
        if metrics["eval_loss"] < self.best:
            self.best, self.waited = metrics["eval_loss"], 0
            self.weights = {name: weight.detach().clone() for name, weight in self.trained.items()}
        control.should_training_stop |= self.waited >= self.patience

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the best weights back."""
        copy_into(self.trained, self.weights)

    def save(self, checkpoint: Path) -> None:
        """Keep the best weights, and what was waited for a better one, in a checkpoint."""
        facts = {"best": repr(self.best), "waited": str(self.waited)}
        save_file(self.weights, checkpoint / BEST, metadata=facts)

    def load(self, checkpoint: Path) -> None:
        """Take up what `save` kept."""
        with safe_open(checkpoint / BEST, "pt") as file:
            self.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.best, self.waited = float(file.metadata()["best"]), int(file.metadata()["waited"])


class Cadence(TrainerCallback):
    """Asks for a checkpoint some minutes after the last one; the first process decides for all."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the time."""
        due = torch.tensor([time.monotonic() - self.last >= self.seconds], device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(due, 0)
        if due and state.global_step < state.max_steps:
            control.should_save = True
            self.last = time.monotonic()


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def copy_into(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Set `weights` to `values` of the same names, in place."""
    for name, value in values.items():
        weights[name].copy_(value)


class PackedTrainer(Trainer):
    """A Trainer whose steps hold an exact number of rows, in packed micro-batches under a token budget."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: LogProbModel,
        args: TrainingArguments,
        rows: Sequence[TokenRow],
        sampler: StepSampler,
        objective: Objective,
        loss_per: str,
        validation: Sequence[TokenRow],
        skip_non_finite: bool,
        schedule: Schedule,
        callbacks: list[TrainerCallback],
    ) -> None:
        """`loss_per` is the unit that the mean loss is taken over: `ids` (pairs) or `targets` (tokens)."""
        model.config = model.model.config  # the Trainer reads it
        super().__init__(model, args, train_dataset=rows, eval_dataset=validation, callbacks=callbacks)
        if args.world_size == 1 and not self.is_fsdp_enabled:
            model.accumulate_in_place = True
        self.sampler, self.objective, self.loss_per = sampler, objective, loss_per
        self.skip_non_finite, self.schedule = skip_non_finite, schedule
        self.rows = {row.id: row for row in rows}
        self.sums: dict[str, float] = defaultdict(float)
        self.step_batches: list[Packed] = []
        self.parts = 1
        self.skipped = self.asked_to_stop = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of packed rows, in the sampler's order; the sampler knows which are this process's."""
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset, batch_sampler=self.sampler, collate_fn=self.collate
        )
        loader.set_epoch = self.sampler.set_epoch
        return loader

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Create the scheduler of `self.schedule`."""
        factor = functools.partial(self.schedule.factor, steps=num_training_steps)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def collate(self, rows: Sequence[TokenRow]) -> Packed:
        """Pack rows; where a short step has none left for this process, one whose loss will count nothing."""
        return {"batch": pack(rows or self.train_dataset[:1]), "weight": int(bool(rows))}

    def get_batch_samples(self, *args: Any) -> tuple[list[Packed], float]:
        """The micro-batches of one step, with the units that its mean loss is taken over, a process."""
        batches, _ = super().get_batch_samples(*args)
        self.step_batches = []
        units = torch.tensor(
            [sum(each["weight"] * len(getattr(each["batch"], self.loss_per)) for each in batches)]
        )
        processes = self.args.world_size  # gradients become means over them
        return batches, self.accelerator.reduce(units.to(self.args.device)).item() / processes

    def training_step(self, model: torch.nn.Module, inputs: Packed, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a micro-batch, in smaller parts once memory did not suffice."""
        if self.asked_to_stop:
            self._keep_state()
            raise Stopped(f"stopped after step {self.state.global_step} of {self.state.max_steps}")
        self.step_batches.append(inputs)
        try:
            return self._backward(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or self.args.world_size > 1:
                raise
        return self._step_anew(model, num_items_in_batch)

    def _backward(self, model: torch.nn.Module, inputs: Packed, units: float) -> Tensor:
        rows = [self.rows[i] for i in inputs["batch"].ids]
        groups = balance(range(len(rows)), [row.tokens for row in rows], self.parts)
        parts = [self.collate([rows[i] for i in group]) for group in groups] if self.parts > 1 else [inputs]
        losses = [super(PackedTrainer, self).training_step(model, part, units) for part in parts]
        return torch.stack(losses).sum().nan_to_num(0.0, 0.0, 0.0)  # the Trainer adds it to a sum over steps

    def _step_anew(self, model: torch.nn.Module, units: float) -> Tensor:
        """Begin the step again in smaller parts: a backward pass that failed has left a part of its gradient."""
        rows = max(len(batch["batch"].ids) for batch in self.step_batches)
        while self.parts < rows:
            self.parts *= 2
            log.warning(
                "step %d: out of memory; each micro-batch is computed in %d parts from here on, with the same "
                "effective batch; lower engine.max_tokens_per_microbatch in params.yaml to start this way",
                *(self.state.global_step + 1, self.parts),
            )
            model.zero_grad()
            self.sums.clear()
            clear_device_cache(garbage_collection=True)
            try:
                return [self._backward(model, batch, units) for batch in self.step_batches][-1]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
        raise InputError(
            f"params.yaml: engine.max_length: step {self.state.global_step + 1}: memory does not suffice for one "
            "pair; lower it, or set gradient_checkpointing: true, or train with dpo.lora"
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Packed,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the step's mean loss."""
        batch = inputs["batch"].to(self.args.device)
        loss, sums = self.objective(model, batch)
        weight = inputs["weight"]
        if not loss.isfinite():
            self._not_finite(f"the loss is {loss.item()}", batch.ids)
            weight = 0
        for name, value in sums.items():
            self.sums[name] += value.item() if weight else 0.0
        self.sums["rows"] += weight * len(batch.ids)
        return loss * inputs["weight"] / num_items_in_batch

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            if not self.skipped:
                ids = [i for batch in self.step_batches for i in batch["batch"].ids]
                self._not_finite(f"the gradient's norm is {float(norm)}", ids)
            model.zero_grad()  # sets gradients to None, and without a gradient the optimizer leaves a weight alone
        return norm

    def _not_finite(self, what: str, ids: Sequence[str]) -> None:
        """Keep the pairs of a step that would spoil the weights; then stop before it, or go on without it."""
        step = self.state.global_step + 1
        replay = Path(self.args.output_dir) / f"{REPLAY}step-{step}-process-{self.args.process_index}.json"
        rows = [vars(self.rows[i]) for i in ids]
        write_json(replay, {"step": step, "fault": what, "rows": rows})
        told = f"step {step}: {what}, from the pairs {', '.join(ids)}; their tokens are in {replay}"
        if self.skip_non_finite:
            self.skipped = True
            log.warning("%s; the step is skipped", told)
            return
        if self.args.world_size == 1:
            self._keep_state()
        raise FloatingPointError(
            f"{told}; training stops before the step and saves no policy. Lower the learning rate, or set "
            "non_finite: skip in params.yaml; run again as it is, and training goes on at this very step"
        )

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss of the validation rows, as `eval_loss`."""
        total, units = 0.0, 0
        for batch in packed_batches(self.eval_dataset, self.sampler.max_tokens_per_microbatch, self.args.device):
            total += self.objective(self.model_wrapped, batch)[0].item()
            units += len(getattr(batch, self.loss_per))
        metrics = {"eval_loss": total / units}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # writes to control
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means over the pairs seen since the last entry, in all processes."""
        if "loss" in logs:
            parts = gather_object([dict(self.sums)])
            sums = {name: sum(part[name] for part in parts) for name in self.sums}
            rows = sums.pop("rows")
            logs |= {name: value / rows for name, value in sums.items()} if rows else {}
            logs["loss"] = math.nan if self.skipped else logs["loss"]
            self.skipped = False
        self.sums.clear()
        super().log(logs, *args, **kwargs)

    def _keep_state(self) -> None:
        """A checkpoint of the state after the last step, since which nothing has changed, if there is none yet."""
        if not (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / SEAL).exists():
            self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Save a complete checkpoint; if there is no room for it, training continues without.

        None of a step that ends the training: going on from there would not know that it was to stop.
        """
        if self.control.should_training_stop:
            return
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            log.warning("%s could not be written (%s); training goes on without it", checkpoint, error)
            shutil.rmtree(checkpoint, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights alone: of a model with adapters, those."""
        assert output_dir is not None
        folder = Path(output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        if self.is_fsdp_enabled:
            return  # the shards are written with those of the optimizer
        if self.args.should_save:
            save_file(trained_weights(self.model.model), folder / TRAINED)
            for stop in self._early_stops():
                stop.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, weights = Path(resume_from_checkpoint), trained_weights(self.model.model)
        with safe_open(folder / TRAINED, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                copy_into(weights, {name: file.get_tensor(name)})
        for stop in self._early_stops():
            stop.load(folder)

    def _early_stops(self) -> list[EarlyStop]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStop)]


@contextmanager
def stopping_on_sigterm(trainer: PackedTrainer) -> Iterator[None]:
    """While in the block, SIGTERM makes `trainer` save a checkpoint and raise Stopped at its next micro-batch."""

    def ask(*_: object) -> None:
        trainer.asked_to_stop = True

    if trainer.args.world_size > 1:  # processes would save at different micro-batches
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
