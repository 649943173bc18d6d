"""Training steps as MLflow metrics."""

import time
from typing import Any

from mlflow.entities import Metric
from transformers import TrainerCallback

from tasks.tracking.offline import record
from tasks.tracking.runs import RESUMED


class StepLog(TrainerCallback):
    """Sends the Trainer's log entries to a run, some steps at a time: one call costs 30 to 50 ms on SQLite."""

    STEPS_AT_ONCE = 10

    def __init__(self, run_id: str) -> None:
        self.run_id, self.waiting = run_id, list[Metric]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was logged before, where the training goes on from a checkpoint: its run is a new one."""
        if state.global_step:
            for entry in state.log_history:
                if "loss" in entry or "eval_loss" in entry:
                    self.keep({name: value for name, value in entry.items() if name != "step"}, entry["step"])
            record(self.run_id, lambda client, run_id: client.set_tag(run_id, RESUMED, state.global_step))
            self.send()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep an entry, and send what waits every few steps."""
        self.keep(logs, state.global_step)
        if state.global_step % self.STEPS_AT_ONCE == 0:
            self.send()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send the rest."""
        self.send()

    def keep(self, entry: dict[str, float], step: int) -> None:
        """Let an entry wait, with the time of now: MLflow orders the points of a curve by step."""
        now = int(time.time() * 1000)
        self.waiting += [Metric(f"train/{name}", float(value), now, step) for name, value in entry.items()]

    def send(self) -> None:
        """Log what waits."""
        record(self.run_id, lambda client, run_id: client.log_batch(run_id, metrics=self.waiting))
        self.waiting = []
