"""What MLflow remembers.

One parent run holds a sweep: all policies trained from the same reference on the same data. Each training of one
beta is a child run, with its parameters, step curves, held-out metrics and answers. A parent is found again by
the hash of the reference cache, so stages in different processes, or days apart, meet in it.
"""

import dataclasses
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow.entities import Param

from dpo.config import Params
from dpo.files import sha256
from tasks.stage import REFERENCE_TRAIN, TRAIN, policy_folder

EXPERIMENT = "dpo-pipeline"
DATABASE = "sqlite:///mlflow.db"
SWEEP, CHECKPOINT, ROLE = "dpo.sweep", "dpo.checkpoint", "dpo.role"


def connect() -> None:
    """Use MLFLOW_TRACKING_URI or `mlflow.db` here; the lock keeps two stages from creating it at once."""
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", DATABASE))
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
def policy_run(params: Params, beta: str, table: pd.DataFrame) -> Iterator[str]:
    """A new child run of the sweep for one beta's training."""
    connect()
    parent = sweep_run(params)
    tags = {**_git_tags(), SWEEP: _sweep(), ROLE: "policy"}
    cut_off = f"tags.`{SWEEP}` = '{_sweep()}' and params.beta = '{beta}' and attributes.status = 'RUNNING'"
    for run in mlflow.search_runs(experiment_names=[EXPERIMENT], filter_string=cut_off, output_format="list"):
        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
    with mlflow.start_run(run_name=f"beta={beta}", parent_run_id=parent, nested=True, tags=tags) as run:
        dpo = {k: v for k, v in dataclasses.asdict(params.dpo).items() if k != "betas"}
        everything = {"seed": params.seed, "model": params.model, "data": params.data, "engine": params.engine}
        mlflow.log_params({"beta": beta, **_flat({**everything, "dpo": dpo})})
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
    mlflow.MlflowClient().set_tag(run_id, CHECKPOINT, sha256(*sorted(folder.glob("*.safetensors"))))


def log_evaluation(
    params: Params, beta: str, table: pd.DataFrame, metrics: dict[str, Any], samples: pd.DataFrame
) -> None:
    """Add held-out metrics and answers to the run that trained this checkpoint.

    Where no run here trained it (DVC may have pulled it), a child run is made for it.
    """
    connect()
    checkpoint = sha256(*sorted(policy_folder(beta).glob("*.safetensors")))
    found = mlflow.search_runs(
        experiment_names=[EXPERIMENT], filter_string=f"tags.`{CHECKPOINT}` = '{checkpoint}'", output_format="list"
    )
    if not found:
        with policy_run(params, beta, pd.read_parquet(TRAIN)) as run_id:
            tag_checkpoint(run_id, policy_folder(beta))
    else:
        run_id = found[0].info.run_id
    with mlflow.start_run(run_id=run_id):
        mlflow.log_metrics({f"eval/{k}": v for k, v in _numbers(metrics).items()})
        mlflow.log_table(samples, "samples.json")
        _log_data(table, "evaluation")


def log_comparison(params: Params, rows: list[dict[str, Any]], files: list[Path]) -> None:
    """Keep the comparison's figures and files in the sweep's parent run, and close it."""
    connect()
    parent = sweep_run(params)
    with mlflow.start_run(run_id=parent):
        for row in rows:
            mlflow.log_metrics({f"beta_{row['beta']:g}/{k}": v for k, v in _numbers(row).items()})
        for file in files:
            mlflow.log_artifact(str(file))


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
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()  # DVC's hash of the file
    data = mlflow.data.from_pandas(table, source=str(path), name=path.stem, digest=digest)
    mlflow.log_input(data, context=context)


def _git_tags() -> dict[str, str]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD")
    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"git_commit": commit or "none", "git_dirty": str(dirty).lower()}
