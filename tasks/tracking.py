"""What MLflow remembers.

One parent run holds a sweep: all policies trained from the same reference on the same data. Each training of one
cell is a child run, with its parameters, step curves, held-out metrics and answers. A parent is found again by
the hash of the reference cache, so stages in different processes, or days apart, meet in it.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import plotly.graph_objects as go
from filelock import FileLock
from mlflow.entities import Param, Run

from dpo.config import Cell, Params
from dpo.files import md5, sha256
from tasks.provenance import commit, weights
from tasks.stage import COMPARISON, MLFLOW_STORE, REFERENCE_TRAIN, REPORT, TRAIN, policy_folder

EXPERIMENT = "dpo-pipeline"
SWEEP, CELL, CHECKPOINT, ROLE = "dpo.sweep", "dpo.cell", "dpo.checkpoint", "dpo.role"


def connect() -> None:
    """Use MLFLOW_TRACKING_URI or `mlflow.db` here; the lock keeps two stages from creating it at once."""
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE))
    with FileLock("mlflow.db.lock"):
        mlflow.set_experiment(EXPERIMENT)
        mlflow.set_experiment_tag("mlflow.experimentKind", "custom_model_development")  # runs, not traces


def log_validation(params: Params, metrics: dict[str, Any], files: list[Path]) -> None:
    """A run of its own for the check of the data, with its figures and files."""
    connect()
    with mlflow.start_run(run_name="data", tags={**_git_tags(), ROLE: "data"}):
        mlflow.log_params(_flat({"seed": params.seed, "data": params.data}))
        mlflow.log_metrics({f"data/{name}": value for name, value in _nested_numbers(metrics).items()})
        for file in files:
            mlflow.log_artifact(str(file))


@contextmanager
def reference_run(params: Params, table: pd.DataFrame) -> Iterator[str]:
    """The run of the reference policy's fine-tuning."""
    connect()
    with mlflow.start_run(run_name="reference (SFT)", tags={**_git_tags(), ROLE: "reference"}) as run:
        mlflow.log_params(_flat({"seed": params.seed, "model": params.model, "sft": params.sft}))
        _log_data(table, "training")
        yield run.info.run_id


@contextmanager
def policy_run(params: Params, cell: Cell, table: pd.DataFrame) -> Iterator[str]:
    """A new child run of the sweep for one cell's training."""
    connect()
    parent = sweep_run(params)
    tags = {**_git_tags(), SWEEP: _sweep(), CELL: cell.key, ROLE: "policy"}
    cut_off = f"tags.`{SWEEP}` = '{_sweep()}' and tags.`{CELL}` = '{cell.key}' and attributes.status = 'RUNNING'"
    for run in mlflow.search_runs(experiment_names=[EXPERIMENT], filter_string=cut_off, output_format="list"):
        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
    with mlflow.start_run(run_name=cell.key, parent_run_id=parent, nested=True, tags=tags) as run:
        own = dataclasses.asdict(cell) | dataclasses.asdict(getattr(params.losses, cell.loss))
        shared = {"model": params.model, "data": params.data, "engine": params.engine, "dpo": params.dpo}
        mlflow.log_params(own | _flat(shared))
        _log_data(table, "training")
        yield run.info.run_id


def sweep_run(params: Params) -> str:
    """The id of this sweep's parent run, made if there is none."""
    client = mlflow.MlflowClient()
    with FileLock("mlflow.db.lock"):
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        here = [experiment.experiment_id]
        found = client.search_runs(here, f"tags.`{SWEEP}` = '{_sweep()}' and tags.`{ROLE}` = 'sweep'")
        if found:
            return str(found[0].info.run_id)
        tags = {**_git_tags(), SWEEP: _sweep(), ROLE: "sweep"}
        run = client.create_run(here[0], run_name=f"sweep {_sweep()[:8]}", tags=tags)
    client.log_batch(
        run.info.run_id,
        params=[Param(k, str(v)) for k, v in _flat({"seed": params.seed, "model": params.model}).items()],
    )
    return str(run.info.run_id)


def tag_checkpoint(run_id: str, folder: Path) -> None:
    """Name the checkpoint that a run made, by content."""
    mlflow.MlflowClient().set_tag(run_id, CHECKPOINT, weights(folder))


def run_of(folder: Path) -> Run | None:
    """The latest run that made this checkpoint."""
    made = f"tags.`{CHECKPOINT}` = '{weights(folder)}'"
    found = mlflow.search_runs(experiment_names=[EXPERIMENT], filter_string=made, output_format="list")
    return found[0] if found else None


def log_evaluation(
    params: Params, cell: Cell, table: pd.DataFrame, metrics: dict[str, Any], samples: pd.DataFrame
) -> None:
    """Add held-out metrics and answers to the run that trained this checkpoint.

    Where no run here trained it (DVC may have pulled it), a child run is made for it.
    """
    connect()
    run = run_of(policy_folder(cell))
    if run is None:
        with policy_run(params, cell, pd.read_parquet(TRAIN)) as run_id:
            tag_checkpoint(run_id, policy_folder(cell))
    else:
        run_id = run.info.run_id
    with mlflow.start_run(run_id=run_id):
        mlflow.log_metrics({f"eval/{k}": v for k, v in _numbers(metrics).items()})
        mlflow.log_table(samples, "samples.json")
        _log_data(table, "evaluation")


def log_comparison(
    params: Params,
    policies: dict[str, dict[str, Any]],
    selected: str | None,
    reason: str,
    figures: list[go.Figure],
) -> None:
    """Keep the comparison's figures, report and choice in the sweep's parent run, and close it."""
    connect()
    with mlflow.start_run(run_id=sweep_run(params)):
        for key, metrics in policies.items():
            mlflow.log_metrics({f"{key}/{name}": value for name, value in _numbers(metrics).items()})
        mlflow.set_tags({"dpo.selected": selected or "none", "mlflow.note.content": reason})
        mlflow.log_artifact(str(REPORT))
        mlflow.log_artifact(str(COMPARISON))
        for figure in figures:
            name = re.sub(r"\W+", "-", figure.layout.title.text.lower()).strip("-")
            mlflow.log_figure(figure, f"figures/{name}.html")


def seconds_of(folders: list[Path]) -> dict[str, str]:
    """How long the training of each checkpoint took, where a run here tells."""
    connect()
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


def _sweep() -> str:
    return sha256(REFERENCE_TRAIN / "manifest.json")


def _flat(groups: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in groups.items():
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _log_data(table: pd.DataFrame, context: str) -> None:
    path = TRAIN if context == "training" else TRAIN.with_name("eval.parquet")
    data = mlflow.data.from_pandas(table, source=str(path), name=path.stem, digest=md5(path))
    mlflow.log_input(data, context=context)


def _git_tags() -> dict[str, str]:
    revision, dirty = commit()
    return {"git_commit": revision, "git_dirty": str(dirty).lower()}
