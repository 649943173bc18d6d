"""Log to one MLflow run, and to its copy in W&B."""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partialmethod
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from tasks.tracking.offline import CONTINUES, OFFLINE_STORE, new_run, or_offline, search
from tasks.tracking.wandb_copy import WandbCopy

WARNINGS = "dpo.warnings"
WARNINGS_LENGTH = 5000


class RunLogger:
    """Log to a run; if the server fails, log to a run in the offline store that continues it.

    A call whose answer is lost is repeated offline. Points have fixed timestamps, so a sync adds no duplicates.
    Methods take the arguments of the methods of MLflow's client that they call, without the run id.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id, self.copy = run_id, WandbCopy(run_id)

    @or_offline
    def _call(self, method: str, *args: object, **kwargs: object) -> None:
        """Call a method of MLflow's client with the id that the run has in the store in use."""
        client, run_id = MlflowClient(), self.run_id
        if mlflow.get_tracking_uri() == OFFLINE_STORE:
            continued = f"tags.`{CONTINUES}` = '{run_id}' and attributes.status = 'RUNNING'"
            found = search(client, f"attributes.run_id = '{run_id}'") or search(client, continued)
            run_id = found[0].info.run_id if found else new_run("continued", {CONTINUES: run_id})
        getattr(client, method)(run_id, *args, **kwargs)

    log_table = partialmethod(_call, "log_table")
    log_datasets = partialmethod(_call, "log_inputs")
    log_artifact = partialmethod(_call, "log_artifact")
    log_figure = partialmethod(_call, "log_figure")
    set_tag = partialmethod(_call, "set_tag")

    def log_metrics(self, points: Sequence[Metric]) -> None:
        """Log points, all in one call, which takes 30 to 50 ms on SQLite."""
        self._call("log_batch", points)
        self.copy.log_metrics(points)

    def close(self, status: str | None = None, end_time: int | None = None) -> None:
        """End the run."""
        self._call("set_terminated", status, end_time)
        self.copy.close(status)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings as strings."""
        self._call("log_batch", params=[Param(name, str(value)) for name, value in params.items()])
        self.copy.log_params(params)


def metric_points(values: Mapping[str, float], step: int = 0) -> list[Metric]:
    """Return metrics of one step with the current time; MLflow sorts the points of a curve by step."""
    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in values.items()]


def step_points(entry: Mapping[str, float]) -> list[Metric]:
    """Return the metrics of an entry of a training's log, which has its number of steps under `step`."""
    return metric_points(
        {f"train/{name}": value for name, value in entry.items() if name != "step"}, int(entry["step"])
    )


class WarningsHandler(logging.Handler):
    """Copy warnings to a tag of a run, up to `WARNINGS_LENGTH` characters."""

    def __init__(self, run: RunLogger) -> None:
        super().__init__(logging.WARNING)
        self.run, self.text = run, ""

    def emit(self, record: logging.LogRecord) -> None:
        """Add a warning."""
        if not logging.root.handlers and logging.lastResort:  # a logger with a handler does not use lastResort
            logging.lastResort.handle(record)
        if len(self.text) < WARNINGS_LENGTH:
            self.text = f"{self.text}{record.getMessage()}\n"[:WARNINGS_LENGTH]
            self.run.set_tag(WARNINGS, self.text)
