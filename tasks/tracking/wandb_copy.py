"""A copy of MLflow's runs in Weights & Biases, if the environment variable WANDB_PROJECT names a project there.

W&B's own variables apply: WANDB_MODE=offline writes to the folder `wandb/`, which `wandb sync` uploads later.
"""

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from dpo.common.errors import InputError
from tasks.tracking.offline import ROLE, SWEEP

PROJECT = "WANDB_PROJECT"


class WandbCopy:
    """One run of W&B, with the id of MLflow's run. Without WANDB_PROJECT its methods do nothing."""

    def __init__(self, run_id: str) -> None:
        self.run = _run(run_id) if os.environ.get(PROJECT) else None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Add settings to the run's configuration."""
        if self.run:
            self.run.config.update({name: str(value) for name, value in params.items()}, allow_val_change=True)

    def log_metrics(self, points: Sequence[Metric]) -> None:
        """Log the steps of a training as curves, and figures without a step in the run's summary."""
        for step, group in itertools.groupby(points, key=lambda point: point.step):
            values = {point.key: point.value for point in group}
            if self.run and step:
                self.run.log(values, step=step)
            elif self.run:
                self.run.summary.update(values)

    def close(self, status: str | None) -> None:
        """End the run. It is marked as failed unless the status is that of a finished run."""
        if self.run:
            self.run.finish(exit_code=int(status not in (None, "FINISHED")))
            _run.cache_clear()


@functools.lru_cache(maxsize=1)
def _run(run_id: str) -> Any:
    """Return the run of W&B with this id; create it, or continue it after an earlier stage or an interruption.

    Raises:
        InputError: W&B is not installed, or it refuses, for example because nobody is logged in.
    """
    try:
        import wandb
    except ImportError as error:
        fix = f"`pip install -e '.[wandb]'`, or unset {PROJECT}"
        raise InputError(f"{PROJECT}: wandb is not installed; {fix}") from error
    try:
        made = mlflow.get_run(run_id)
        name, tags = made.info.run_name, made.data.tags
    except MlflowException:  # the server is unreachable
        name, tags = None, {}
    try:
        return wandb.init(
            id=run_id,
            name=name,
            group=tags.get(SWEEP),
            job_type=tags.get(ROLE),
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise InputError(
            f"{PROJECT}: W&B refuses: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
