"""MLflow runs of the stages.

One parent run holds a sweep: all policies that were trained from the same reference on the same data. Each
training of a trial is a child run with its parameters, step curves, held-out metrics and responses. Stages find
the parent run by a hash of these, in any process and at any time.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, Run
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from dpo.common.files import md5
from dpo.config import Params
from dpo.training.settings import Trial
from tasks.common.flatten import flatten
from tasks.common.git import head_commit
from tasks.common.markdown import inline
from tasks.common.paths import (
    COMPARISON,
    EVAL,
    RAW_PAIRS,
    REFERENCE,
    REPORT,
    TRAIN,
    policy_folder,
)
from tasks.tracking import offline
from tasks.tracking.offline import CHECKPOINT, ROLE, SWEEP, TRIAL, new_run, or_offline, search
from tasks.tracking.provenance import weights
from tasks.tracking.run_logger import RunLogger, WarningsHandler, metric_points, step_points

if TYPE_CHECKING:
    import plotly.graph_objects as go

RESUMED = "dpo.resumed_at_step"
INPUTS = "dpo.inputs"
"""Tag of runs that do not belong to a sweep: a hash of settings and data."""
SCHEMA_ROWS = 100
"""Rows of a table from which the schema of a run's data is inferred."""


def log_validation(params: Params, metrics: dict[str, Any], files: list[Path]) -> None:
    """Create a run for the validation of the data, with its metrics and files."""
    offline.connect_or_offline()
    settings = _settings(seed=params.seed, data=params.data)
    run = RunLogger(_begin("data", {ROLE: "data", INPUTS: _hash(settings, RAW_PAIRS)}))
    for file in files:
        run.log_artifact(str(file))
    run.log_params(settings)
    run.log_metrics(metric_points(_numbers(metrics, "data")))
    run.close()


def log_reward_model(params: Params, seed: int, log: list[dict[str, float]], metrics: dict[str, Any]) -> None:
    """Create a run for a reward model, with the log of its training, its held-out accuracy and its cost."""
    offline.connect_or_offline()
    settings = _settings(seed=seed, reward_model=params.reward_model)
    run = RunLogger(_begin(f"reward model {seed}", {ROLE: "reward model", INPUTS: _hash(settings, TRAIN)}))
    run.log_params(settings)
    run.log_datasets([_dataset(TRAIN, "training")])
    steps = [point for entry in log for point in step_points(entry)]
    run.log_metrics([*steps, *metric_points(_numbers(metrics, "eval"))])
    run.close()


def reference_run(params: Params, data: Path = TRAIN) -> AbstractContextManager[str]:
    """Create a run for the fine-tuning of the reference on the rows in the file `data`; yield its id."""
    offline.connect_or_offline()
    settings = _settings(seed=params.seed, model=params.model, sft=params.sft)
    tags = {ROLE: "reference", INPUTS: _hash(settings, data)}
    return _training("reference (SFT)", tags, settings, data)


def policy_run(params: Params, trial: Trial) -> AbstractContextManager[str]:
    """Create a child run of the sweep for the training of a trial; yield its id."""
    offline.connect_or_offline()
    tags = {SWEEP: _sweep(params), TRIAL: trial.name, ROLE: "policy", MLFLOW_PARENT_RUN_ID: sweep_run(params)}
    groups = {"model": params.model, "data": params.data, "engine": params.engine, "dpo": params.dpo}
    return _training(trial.name, tags, _settings(**groups, **trial.settings), TRAIN)


@contextmanager
def _training(name: str, tags: dict[str, str], settings: dict[str, Any], data: Path) -> Iterator[str]:
    """Create a run that records the library's warnings and ends with the block."""
    run = RunLogger(_begin(name, tags))
    run.log_params(settings)
    run.log_datasets([_dataset(data, "training")])
    library, handler, status = logging.getLogger("dpo"), WarningsHandler(run), "FAILED"
    library.addHandler(handler)
    try:
        yield run.run_id
        status = "FINISHED"
    finally:
        library.removeHandler(handler)
        run.close(status)


@or_offline
def _begin(name: str, tags: dict[str, str]) -> str:
    """Mark interrupted runs with the same tags as killed, and create a new run."""
    client = MlflowClient()
    same = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    for run in search(client, f"{same} and attributes.status = 'RUNNING'"):
        client.set_terminated(run.info.run_id, "KILLED")
    return new_run(name, tags)


@or_offline
def sweep_run(params: Params) -> str:
    """Return the id of this sweep's parent run; create the run if it does not exist."""
    sweep = _sweep(params)
    with offline.store_lock():
        found = search(MlflowClient(), f"tags.`{SWEEP}` = '{sweep}' and tags.`{ROLE}` = 'sweep'")
        if found:
            return str(found[0].info.run_id)
        name = f"sweep {datetime.now(UTC):%Y-%m-%d %H:%M} {head_commit()[:7]}"  # the gate adds its verdict
        run_id = new_run(name, {SWEEP: sweep, ROLE: "sweep"})
    RunLogger(run_id).log_params(_settings(seed=params.seed, model=params.model))
    return run_id


def tag_checkpoint(run_id: str, folder: Path) -> None:
    """Tag a run with the hash of the checkpoint that it made."""
    RunLogger(run_id).set_tag(CHECKPOINT, weights(folder))


@or_offline
def run_of(folder: Path) -> Run | None:
    """Return the latest run of the reference, or of a trial, that made this checkpoint."""
    made = f"tags.`{CHECKPOINT}` = '{weights(folder)}'"
    own = "'reference'" if folder == REFERENCE else f"'policy' and tags.`{TRIAL}` = '{folder.name}'"
    return next(iter(search(MlflowClient(), f"{made} and tags.`{ROLE}` = {own}")), None)


def log_evaluation(params: Params, trial: Trial, metrics: dict[str, Any], samples: pd.DataFrame) -> None:
    """Add held-out metrics and responses to the run that trained this checkpoint, which keeps its end time.

    If this MLflow has no such run (DVC may have pulled the checkpoint), create a child run of the sweep for it.
    """
    offline.connect_or_offline()
    made = run_of(policy_folder(trial))
    if made is None:
        with policy_run(params, trial) as run_id:
            tag_checkpoint(run_id, policy_folder(trial))
    else:
        run_id = made.info.run_id
    run = RunLogger(run_id)
    run.log_table(samples, "samples.json")
    run.log_datasets([_dataset(EVAL, "evaluation")])
    run.log_metrics(metric_points(_numbers(metrics, "eval")))
    is_offline = mlflow.get_tracking_uri() == offline.OFFLINE_STORE  # there a new end time makes `sync` upload it
    run.close(end_time=None if made is None or is_offline else made.info.end_time)


def log_comparison(
    params: Params, policies: dict[str, Any], selected: str | None, reason: str, figures: list["go.Figure"]
) -> None:
    """Add figures, report and selection to the sweep's parent run, and end it."""
    offline.connect_or_offline()
    run = RunLogger(sweep_run(params))
    run.log_artifact(str(REPORT))
    run.log_artifact(str(COMPARISON))
    for figure in figures:
        name = re.sub(r"\W+", "-", figure.layout.title.text.lower()).strip("-")
        run.log_figure(figure, f"figures/{name}.html")
    run.set_tag("dpo.selected", selected or "none")
    run.set_tag("mlflow.note.content", inline(reason))  # MLflow shows it as Markdown
    for name, metrics in policies.items():
        run.log_metrics(metric_points(_numbers(metrics, name)))
    run.close()


def training_times(folders: list[Path]) -> dict[str, str]:
    """Return how long the training of each checkpoint took, for those whose run is known here."""
    offline.connect_or_offline()
    times = {folder: run.data.metrics.get("train/train_runtime") for folder in folders if (run := run_of(folder))}
    return {str(folder): f"{seconds:.0f} s" for folder, seconds in times.items() if seconds is not None}


def log_capability(params: Params, result: dict[str, Any]) -> None:
    """Add the results of a benchmark task to the sweep's parent run."""
    offline.connect_or_offline()
    run = RunLogger(sweep_run(params))
    figures = {group: result[group] for group in ("models", "differences")}
    run.log_metrics(metric_points(_numbers(figures, f"capabilities/{result['task']}")))


def run_pages(params: Params, folders: list[Path]) -> dict[str, str]:
    """Return the page in MLflow's UI of the run that made each checkpoint, and of the sweep as `sweep`.

    Without a server the pages are those of `make mlflow`. While MLflow is unreachable there are none.
    """
    if not offline.connect_or_offline():
        return {}
    made = {str(folder): run for folder in folders if (run := run_of(folder))}
    for run in search(MlflowClient(), f"tags.`{SWEEP}` = '{_sweep(params)}' and tags.`{ROLE}` = 'sweep'"):
        made["sweep"] = run
    return {name: offline.page(run.info.experiment_id, f"runs/{run.info.run_id}") for name, run in made.items()}


@or_offline
def frontier_page(params: Params, reward: str) -> str | None:
    """Save a view of MLflow's UI, as its button "Share" does: the metric `reward` against KL, a point per policy.

    Returns:
        The address of the view; None while MLflow is unreachable.
    """
    if not offline.connect_or_offline():
        return None
    section = {"uuid": "frontier", "name": "Reward against KL", "display": True, "columns": 1, "cardHeight": 440}
    axes = {
        f"{axis}axis": {"key": f"eval/{name}", "type": "METRIC"} for axis, name in (("x", "kl"), ("y", reward))
    }
    chart = {
        "uuid": "frontier",
        "type": "SCATTER",
        "metricSectionId": "frontier",
        "runsCountToCompare": 100,
        **axes,
    }
    sweep, client = _sweep(params), MlflowClient()
    view = {
        "searchFilter": f"tags.`{SWEEP}` = '{sweep}' AND tags.`{ROLE}` = 'policy'",
        "orderByKey": f"metrics.`eval/{reward}`",  # in this order policies are not folded below their sweep
        "runsHiddenMode": "SHOWALL",
        "compareRunSections": [section],
        "compareRunCharts": [chart],
        "isAccordionReordered": True,  # the section of this chart is the first one
    }
    experiment = client.get_experiment_by_name(offline.EXPERIMENT).experiment_id
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{sweep}", json.dumps(view))
    return offline.page(experiment, frontier_path(sweep))


def frontier_path(sweep: str) -> str:
    """Return the address of the chart of a sweep below that of its experiment."""
    return f"runs?viewStateShareKey={sweep}&compareRunsMode=CHART"


def _numbers(metrics: dict[str, Any], group: str) -> dict[str, float]:
    """Return the numbers among nested metrics by `group/PATH`; `NAME_ci` becomes NAME_low and NAME_high."""
    flat: dict[str, float] = {}
    for path, value in flatten({k: v for k, v in metrics.items() if k != "trial"}):
        name = "/".join([group, *(re.sub(r"[^\w. -]", ".", part) for part in path)])  # MLflow allows no others
        if isinstance(value, int | float):
            flat[name] = float(value)
        elif isinstance(value, list) and name.endswith("_ci"):
            flat[name.removesuffix("_ci") + "_low"], flat[name.removesuffix("_ci") + "_high"] = value
    return flat


def _settings(**groups: Any) -> dict[str, Any]:
    return {".".join(path): value for path, value in flatten(groups)}


def _hash(settings: dict[str, Any], data: Path) -> str:
    return hashlib.sha256(f"{settings}{md5(data)}".encode()).hexdigest()[:16]


def _sweep(params: Params) -> str:
    return _hash(_settings(reference=weights(REFERENCE), engine=params.engine), TRAIN)


def _dataset(path: Path, context: str) -> DatasetInput:
    """Describe a Parquet file. The schema is that of its first rows."""
    source = LocalArtifactDatasetSource(str(path))
    with pq.ParquetFile(path) as file:
        first = next(file.iter_batches(SCHEMA_ROWS)).to_pandas()
        profile = json.dumps({"num_rows": file.metadata.num_rows})
    data = mlflow.data.from_pandas(first, source=source, name=path.stem, digest=md5(path))
    facts = {**data.to_dict(), "profile": profile}
    return DatasetInput(Dataset.from_dictionary(facts), [InputTag(MLFLOW_DATASET_CONTEXT, context)])
