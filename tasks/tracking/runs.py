"""What MLflow remembers.

One parent run holds a sweep: all policies trained from the same reference on the same data. Each training of one
trial is a child run, with its parameters, step curves, held-out metrics and answers. A parent is found again by
the hash of the reference cache, so stages in different processes, or days apart, meet in it.
"""

import dataclasses
import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import plotly.graph_objects as go
from mlflow import MlflowClient
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from dpo.common.files import md5, sha256
from dpo.config import Params
from dpo.training.settings import Trial
from tasks.common.paths import (
    COMPARISON,
    RAW_PAIRS,
    REFERENCE_TRAIN,
    REPORT,
    TRAIN,
    policy_folder,
)
from tasks.tracking.offline import (
    CHECKPOINT,
    ROLE,
    SWEEP,
    connect_or_offline,
    new_run,
    record,
    reliable,
    search,
    store_lock,
)
from tasks.tracking.provenance import weights

TRIAL, ALARMS, RESUMED = "dpo.trial", "dpo.alarms", "dpo.resumed_at_step"
INPUTS = "dpo.inputs"
"""Of a run outside of a sweep: a hash of settings and data."""
ALARMS_LENGTH = 5000


def log_validation(params: Params, metrics: dict[str, Any], files: list[Path]) -> None:
    """A run of its own for the check of the data, with its figures and files."""
    connect_or_offline()
    settings = _flat({"seed": params.seed, "data": params.data})
    figures = {f"data/{name}": value for name, value in _nested_numbers(metrics).items()}

    def write(client: MlflowClient, run_id: str) -> None:
        for file in files:
            client.log_artifact(run_id, str(file))
        client.log_batch(run_id, params=_params(settings), metrics=_metrics(figures))
        client.set_terminated(run_id)

    record(_begin("data", {ROLE: "data", INPUTS: _inputs(settings, RAW_PAIRS)}), write)


@contextmanager
def reference_run(params: Params, table: pd.DataFrame) -> Iterator[str]:
    """The run of the reference policy's fine-tuning."""
    connect_or_offline()
    settings = _flat({"seed": params.seed, "model": params.model, "sft": params.sft})
    tags = {ROLE: "reference", INPUTS: _inputs(settings, TRAIN)}
    with _training("reference (SFT)", tags, settings, table) as run_id:
        yield run_id


@contextmanager
def policy_run(params: Params, trial: Trial, table: pd.DataFrame) -> Iterator[str]:
    """A new child run of the sweep for one trial's training."""
    connect_or_offline()
    parent = sweep_run(params)
    own = dataclasses.asdict(trial) | dataclasses.asdict(getattr(params.losses, trial.loss))
    shared = {"model": params.model, "data": params.data, "engine": params.engine, "dpo": params.dpo}
    tags = {SWEEP: _sweep(), TRIAL: trial.name, ROLE: "policy", MLFLOW_PARENT_RUN_ID: parent}
    with _training(trial.name, tags, own | _flat(shared), table) as run_id:
        yield run_id


@contextmanager
def _training(name: str, tags: dict[str, str], settings: dict[str, Any], table: pd.DataFrame) -> Iterator[str]:
    """A new run, which hears what the library warns of, and ends as the block ends."""
    run_id = _begin(name, tags)

    def begin(client: MlflowClient, run_id: str) -> None:
        client.log_batch(run_id, params=_params(settings))
        client.log_inputs(run_id, [_data(table, "training")])

    record(run_id, begin)
    library, alarms, status = logging.getLogger("dpo"), Alarms(run_id), "FAILED"
    library.addHandler(alarms)
    try:
        yield run_id
        status = "FINISHED"
    finally:
        library.removeHandler(alarms)
        record(run_id, lambda client, run_id: client.set_terminated(run_id, status))


class Alarms(logging.Handler):
    """Keeps warnings in a run's tag, the first `ALARMS_LENGTH` characters of them."""

    def __init__(self, run_id: str) -> None:
        super().__init__(logging.WARNING)
        self.run_id, self.text = run_id, ""

    def emit(self, warning: logging.LogRecord) -> None:
        """Add a warning."""
        if not logging.root.handlers and logging.lastResort:  # which a logger with a handler does without
            logging.lastResort.handle(warning)
        if len(self.text) < ALARMS_LENGTH:
            self.text = f"{self.text}{warning.getMessage()}\n"[:ALARMS_LENGTH]
            record(self.run_id, lambda client, run_id: client.set_tag(run_id, ALARMS, self.text))


def _begin(name: str, tags: dict[str, str]) -> str:
    """A new run; those that did the same before and were cut off are marked as killed."""
    _end_cut_off(tags)
    return new_run(name, tags)


@reliable
def _end_cut_off(tags: dict[str, str]) -> None:
    client = MlflowClient()
    same = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    for run in search(client, f"{same} and attributes.status = 'RUNNING'"):
        client.set_terminated(run.info.run_id, "KILLED")


@reliable
def sweep_run(params: Params) -> str:
    """The id of this sweep's parent run, made if there is none."""
    with store_lock():
        found = search(MlflowClient(), f"tags.`{SWEEP}` = '{_sweep()}' and tags.`{ROLE}` = 'sweep'")
        if found:
            return str(found[0].info.run_id)
        run_id = new_run(f"sweep {_sweep()[:8]}", {SWEEP: _sweep(), ROLE: "sweep"})
    settings = _params(_flat({"seed": params.seed, "model": params.model}))
    record(run_id, lambda client, run_id: client.log_batch(run_id, params=settings))
    return run_id


def tag_checkpoint(run_id: str, folder: Path) -> None:
    """Name the checkpoint that a run made, by content."""
    record(run_id, lambda client, run_id: client.set_tag(run_id, CHECKPOINT, weights(folder)))


@reliable
def run_of(folder: Path) -> Run | None:
    """The latest run that made this checkpoint."""
    found = search(MlflowClient(), f"tags.`{CHECKPOINT}` = '{weights(folder)}'")
    return found[0] if found else None


def log_evaluation(
    params: Params, trial: Trial, table: pd.DataFrame, metrics: dict[str, Any], samples: pd.DataFrame
) -> None:
    """Add held-out metrics and answers to the run that trained this checkpoint.

    Where no run here trained it (DVC may have pulled it), a child run is made for it.
    """
    connect_or_offline()
    run = run_of(policy_folder(trial))
    if run is None:
        with policy_run(params, trial, pd.read_parquet(TRAIN)) as run_id:
            tag_checkpoint(run_id, policy_folder(trial))
    else:
        run_id = run.info.run_id

    def write(client: MlflowClient, run_id: str) -> None:
        client.log_table(run_id, samples, "samples.json")
        client.log_inputs(run_id, [_data(table, "evaluation")])
        client.log_batch(run_id, metrics=_metrics({f"eval/{k}": v for k, v in _numbers(metrics).items()}))
        client.set_terminated(run_id)

    record(run_id, write)


def log_comparison(
    params: Params,
    policies: dict[str, dict[str, Any]],
    selected: str | None,
    reason: str,
    figures: list[go.Figure],
) -> None:
    """Keep the comparison's figures, report and choice in the sweep's parent run, and close it."""
    connect_or_offline()
    rows = {key: _numbers(metrics).items() for key, metrics in policies.items()}

    def write(client: MlflowClient, run_id: str) -> None:
        client.log_artifact(run_id, str(REPORT))
        client.log_artifact(run_id, str(COMPARISON))
        for figure in figures:
            name = re.sub(r"\W+", "-", figure.layout.title.text.lower()).strip("-")
            client.log_figure(run_id, figure, f"figures/{name}.html")
        choice = {"dpo.selected": selected or "none", "mlflow.note.content": reason}
        client.log_batch(
            run_id,
            tags=[RunTag(k, v) for k, v in choice.items()],
            metrics=_metrics({f"{key}/{name}": value for key, row in rows.items() for name, value in row}),
        )
        client.set_terminated(run_id)

    record(sweep_run(params), write)


def seconds_of(folders: list[Path]) -> dict[str, str]:
    """How long the training of each checkpoint took, where a run here tells."""
    connect_or_offline()
    runs = {folder: run_of(folder) for folder in folders}
    return {
        str(folder): f"{run.data.metrics['train/train_runtime']:.0f} s"
        for folder, run in runs.items()
        if run is not None and "train/train_runtime" in run.data.metrics
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers as they are; an interval `NAME_ci` as NAME_low and NAME_high; nulls left out."""
    flat = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
    for name, value in metrics.items():
        if isinstance(value, list):
            flat |= {name.replace("_ci", "_low"): value[0], name.replace("_ci", "_high"): value[1]}
    return flat


def _nested_numbers(metrics: dict[str, Any], above: str = "") -> dict[str, float]:
    """Numbers at any depth by their path; characters that MLflow refuses in names become dots."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = above + re.sub(r"[^\w. -]", ".", name)
        if isinstance(value, dict):
            flat |= _nested_numbers(value, f"{path}/")
        elif isinstance(value, int | float):
            flat[path] = float(value)
    return flat


def _inputs(settings: dict[str, Any], data: Path) -> str:
    return hashlib.sha256(f"{settings}{md5(data)}".encode()).hexdigest()[:16]


def _sweep() -> str:
    return sha256(REFERENCE_TRAIN / "manifest.json")


def _flat(groups: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in groups.items():
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _params(settings: dict[str, Any]) -> list[Param]:
    return [Param(name, str(value)) for name, value in settings.items()]


def _metrics(values: dict[str, float]) -> list[Metric]:
    return [Metric(name, value, int(time.time() * 1000), 0) for name, value in values.items()]


def _data(table: pd.DataFrame, context: str) -> DatasetInput:
    path = TRAIN if context == "training" else TRAIN.with_name("eval.parquet")
    source = LocalArtifactDatasetSource(str(path))
    data = mlflow.data.from_pandas(table, source=source, name=path.stem, digest=md5(path))
    return DatasetInput(Dataset.from_dictionary(data.to_dict()), [InputTag(MLFLOW_DATASET_CONTEXT, context)])
