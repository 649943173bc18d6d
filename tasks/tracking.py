"""What MLflow remembers.

One parent run holds a sweep: all policies trained from the same reference on the same data. Each training of one
cell is a child run, with its parameters, step curves, held-out metrics and answers. A parent is found again by
the hash of the reference cache, so stages in different processes, or days apart, meet in it.

Where MLflow's server does not answer, or fails in the middle of a training, all goes to a local store, the spool.
The next stage that finds the server delivers it.
"""

import dataclasses
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlflow
import pandas as pd
import plotly.graph_objects as go
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from dpo.config import Cell, Params
from dpo.errors import InputError
from dpo.files import md5, sha256
from tasks.provenance import commit, weights
from tasks.stage import COMPARISON, MLFLOW_STORE, REFERENCE_TRAIN, REPORT, TRAIN, policy_folder

EXPERIMENT = "dpo-pipeline"
SWEEP, CELL, CHECKPOINT, ROLE, ALARMS = "dpo.sweep", "dpo.cell", "dpo.checkpoint", "dpo.role", "dpo.alarms"
SPOOL = f"{MLFLOW_STORE}.spool"
RESUMED = "dpo.resumed_at_step"
SPOOLED = "dpo.spooled"
"""The id that a server's run had in the spool; the provenance of its checkpoint names it."""
CONTINUES, DELIVERED = "dpo.continues", "dpo.delivered"
"""Of runs in the spool: the server's run that goes on there; the end time with which a run was delivered."""
OF_BEGINNING = ("git_", "mlflow.source.", "mlflow.user", MLFLOW_RUN_NAME, MLFLOW_PARENT_RUN_ID)
"""Beginnings of the tags that a run on the server keeps, whatever is added to it."""
ALARMS_LENGTH = 5000
CALL_SECONDS, DELIVERY_SECONDS = 5, 60

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def connect() -> None:
    """Use MLFLOW_TRACKING_URI or `mlflow.db` here, for what cannot wait: models and which one is the champion.

    Raises:
        InputError: the server does not answer.
    """
    if not connect_or_spool():
        store = os.environ["MLFLOW_TRACKING_URI"]
        raise InputError(f"MLFLOW_TRACKING_URI: {store}: connection refused or timed out; start MLflow, try again")


def connect_or_spool() -> bool:
    """Use MLFLOW_TRACKING_URI or `mlflow.db` here, and deliver what the spool holds; else use the spool.

    Returns:
        False in the spool.

    Raises:
        MlflowException: the server answers, but refuses.
    """
    store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
    try:
        with _patience(CALL_SECONDS):
            _use(store)
        if _is_server(store) and Path(SPOOL.removeprefix("sqlite:///")).exists():
            deliver()
    except (MlflowException, OSError) as error:
        if not _is_server(store) or (isinstance(error, MlflowException) and error.get_http_status_code() < 500):
            raise
        _use_spool(store, error)
        return False
    return True


def _use(store: str) -> None:
    mlflow.set_tracking_uri(store)
    with _lock():
        mlflow.set_experiment(EXPERIMENT)
        mlflow.set_experiment_tag("mlflow.experimentKind", "custom_model_development")  # runs, not traces


def _lock() -> FileLock:
    """Keeps two stages from creating a store, or a sweep's run, at once; this process may enter it again."""
    return FileLock("mlflow.db.lock", is_singleton=True)


def _use_spool(store: str, error: Exception) -> None:
    if mlflow.get_tracking_uri() != SPOOL:
        log.warning("MLflow at %s fails; what it should get is kept here until it answers: %s", store, error)
    _use(SPOOL)
    os.environ["MLFLOW_TRACKING_URI"] = store  # MLflow has set it to the spool


def _is_server(store: str) -> bool:
    return store.startswith(("http://", "https://"))


@contextmanager
def _patience(seconds: int) -> Iterator[None]:
    """Bound how long one call to a server may take: two more tries, not MLflow's minutes of them."""
    settings = {"MAX_RETRIES": "2", "BACKOFF_FACTOR": "1", "TIMEOUT": str(seconds)}
    ours = {f"MLFLOW_HTTP_REQUEST_{k}": v for k, v in settings.items()}
    ours = {k: v for k, v in ours.items() if k not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _reliable(call: Callable[P, T]) -> Callable[P, T]:
    """Where a server fails, the call is made again in the spool; a fault of the call itself shows there too."""

    @functools.wraps(call)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        store = mlflow.get_tracking_uri()
        try:
            with _patience(CALL_SECONDS):
                return call(*args, **kwargs)
        except (MlflowException, OSError) as error:
            if not _is_server(store):
                raise
            _use_spool(store, error)
            return call(*args, **kwargs)

    return again


@_reliable
def record(run_id: str, write: Callable[[MlflowClient, str], object]) -> None:
    """Write to a run or, in the spool, to a run that continues it.

    Args:
        run_id: the run.
        write: does the writing, with the client and the run's id in the store in use. It can be called again from
            the start in the spool: metrics that are logged last, or have timestamps of their own, are there once.
    """
    client = MlflowClient()
    write(client, run_id if mlflow.get_tracking_uri() != SPOOL else _spooled(client, run_id))


def _spooled(client: MlflowClient, run_id: str) -> str:
    """The run of this id, if it began in the spool; else the run there that continues it."""
    going_on = f"tags.`{CONTINUES}` = '{run_id}' and attributes.status = 'RUNNING'"
    found = _search(client, f"attributes.run_id = '{run_id}'") or _search(client, going_on)
    return found[0].info.run_id if found else _new_run("continued", {CONTINUES: run_id})


def _search(client: MlflowClient, wanted: str = "") -> list[Run]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], wanted, max_results=10_000)) if experiment else []


@_reliable
def _new_run(name: str, tags: dict[str, str]) -> str:
    """The id of a new run, with tags that tell user, command and commit."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, run_name=name, tags=resolve_tags(_git_tags() | tags))
    return str(run.info.run_id)


def deliver() -> None:
    """Bring what the spool holds to the server; can be cut off at any point, and then goes on the next time.

    A run that the server refuses stays in the spool, with a warning.
    """
    spool, server = MlflowClient(SPOOL), MlflowClient()
    with FileLock("mlflow.db.spool.lock"), _patience(DELIVERY_SECONDS):
        runs = [run for run in _search(spool) if run.data.tags.get(DELIVERED) != str(run.info.end_time)]
        for run in sorted(runs, key=lambda run: (run.data.tags.get(ROLE) != "sweep", run.info.start_time)):
            try:
                _deliver(spool, server, run)
            except MlflowException as error:
                if error.get_http_status_code() >= 500:
                    raise
                log.warning("MLflow refuses run %s, which stays in %s: %s", run.info.run_id, SPOOL, error)


def _deliver(spool: MlflowClient, server: MlflowClient, run: Run) -> None:
    info, tags = run.info, {k: v for k, v in run.data.tags.items() if k not in (CONTINUES, DELIVERED)}
    target = _delivered(server, run)
    if target is None:
        parent = _search(spool, f"attributes.run_id = '{tags.get(MLFLOW_PARENT_RUN_ID)}'")
        if parent:
            tags[MLFLOW_PARENT_RUN_ID] = _delivered(server, parent[0])
        experiment = server.get_experiment_by_name(EXPERIMENT)
        target = server.create_run(
            experiment.experiment_id, info.start_time, tags | {SPOOLED: info.run_id}, info.run_name
        ).info.run_id
    there = server.get_run(target).data.params
    server.log_batch(
        target,
        params=[Param(k, v) for k, v in run.data.params.items() if k not in there],
        tags=[RunTag(k, v) for k, v in tags.items() if not k.startswith(OF_BEGINNING)],
    )
    points = [point for key in run.data.metrics for point in spool.get_metric_history(info.run_id, key)]
    server.log_batch(target, metrics=[Metric(p.key, p.value, p.timestamp, p.step) for p in points])
    if run.inputs.dataset_inputs:
        server.log_inputs(target, run.inputs.dataset_inputs)
    if spool.list_artifacts(info.run_id):
        server.log_artifacts(target, spool.download_artifacts(info.run_id, ""))
    if info.status != "RUNNING":
        server.set_terminated(target, info.status, info.end_time)
    if server.get_run(target).info.status != "RUNNING":  # nor will it get more, if its process was killed
        spool.set_tag(info.run_id, DELIVERED, str(info.end_time))


def _delivered(server: MlflowClient, run: Run) -> str | None:
    """The server's run to which a run of the spool belongs."""
    tags = run.data.tags
    wanted = [f"tags.`{SPOOLED}` = '{run.info.run_id}'"]
    if CONTINUES in tags:
        wanted.insert(0, f"attributes.run_id = '{tags[CONTINUES]}'")
    if tags.get(ROLE) == "sweep":
        wanted.append(f"tags.`{SWEEP}` = '{tags[SWEEP]}' and tags.`{ROLE}` = 'sweep'")
    elif CHECKPOINT in tags and not any(key.startswith("train/") for key in run.data.metrics):
        wanted.append(f"tags.`{CHECKPOINT}` = '{tags[CHECKPOINT]}'")  # evaluated here, trained before
    return next((str(found[0].info.run_id) for query in wanted if (found := _search(server, query))), None)


def log_validation(params: Params, metrics: dict[str, Any], files: list[Path]) -> None:
    """A run of its own for the check of the data, with its figures and files."""
    connect_or_spool()
    settings = _flat({"seed": params.seed, "data": params.data})
    figures = {f"data/{name}": value for name, value in _nested_numbers(metrics).items()}

    def write(client: MlflowClient, run_id: str) -> None:
        for file in files:
            client.log_artifact(run_id, str(file))
        client.log_batch(run_id, params=_params(settings), metrics=_metrics(figures))
        client.set_terminated(run_id)

    record(_new_run("data", {ROLE: "data"}), write)


@contextmanager
def reference_run(params: Params, table: pd.DataFrame) -> Iterator[str]:
    """The run of the reference policy's fine-tuning."""
    connect_or_spool()
    settings = _flat({"seed": params.seed, "model": params.model, "sft": params.sft})
    with _training("reference (SFT)", {ROLE: "reference"}, settings, table) as run_id:
        yield run_id


@contextmanager
def policy_run(params: Params, cell: Cell, table: pd.DataFrame) -> Iterator[str]:
    """A new child run of the sweep for one cell's training."""
    connect_or_spool()
    parent = sweep_run(params)
    _end_cut_off(cell)
    own = dataclasses.asdict(cell) | dataclasses.asdict(getattr(params.losses, cell.loss))
    shared = {"model": params.model, "data": params.data, "engine": params.engine, "dpo": params.dpo}
    tags = {SWEEP: _sweep(), CELL: cell.key, ROLE: "policy", MLFLOW_PARENT_RUN_ID: parent}
    with _training(cell.key, tags, own | _flat(shared), table) as run_id:
        yield run_id


@contextmanager
def _training(name: str, tags: dict[str, str], settings: dict[str, Any], table: pd.DataFrame) -> Iterator[str]:
    """A new run, which hears what the library warns of, and ends as the block ends."""
    run_id = _new_run(name, tags)

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


@_reliable
def _end_cut_off(cell: Cell) -> None:
    """Mark a cell's runs that were cut off as killed."""
    client = MlflowClient()
    cut_off = f"tags.`{SWEEP}` = '{_sweep()}' and tags.`{CELL}` = '{cell.key}' and attributes.status = 'RUNNING'"
    for run in _search(client, cut_off):
        client.set_terminated(run.info.run_id, "KILLED")


@_reliable
def sweep_run(params: Params) -> str:
    """The id of this sweep's parent run, made if there is none."""
    with _lock():
        found = _search(MlflowClient(), f"tags.`{SWEEP}` = '{_sweep()}' and tags.`{ROLE}` = 'sweep'")
        if found:
            return str(found[0].info.run_id)
        run_id = _new_run(f"sweep {_sweep()[:8]}", {SWEEP: _sweep(), ROLE: "sweep"})
    settings = _params(_flat({"seed": params.seed, "model": params.model}))
    record(run_id, lambda client, run_id: client.log_batch(run_id, params=settings))
    return run_id


def tag_checkpoint(run_id: str, folder: Path) -> None:
    """Name the checkpoint that a run made, by content."""
    record(run_id, lambda client, run_id: client.set_tag(run_id, CHECKPOINT, weights(folder)))


@_reliable
def run_of(folder: Path) -> Run | None:
    """The latest run that made this checkpoint."""
    found = _search(MlflowClient(), f"tags.`{CHECKPOINT}` = '{weights(folder)}'")
    return found[0] if found else None


def log_evaluation(
    params: Params, cell: Cell, table: pd.DataFrame, metrics: dict[str, Any], samples: pd.DataFrame
) -> None:
    """Add held-out metrics and answers to the run that trained this checkpoint.

    Where no run here trained it (DVC may have pulled it), a child run is made for it.
    """
    connect_or_spool()
    run = run_of(policy_folder(cell))
    if run is None:
        with policy_run(params, cell, pd.read_parquet(TRAIN)) as run_id:
            tag_checkpoint(run_id, policy_folder(cell))
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
    connect_or_spool()
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
    connect_or_spool()
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


def _params(settings: dict[str, Any]) -> list[Param]:
    return [Param(name, str(value)) for name, value in settings.items()]


def _metrics(values: dict[str, float]) -> list[Metric]:
    return [Metric(name, value, int(time.time() * 1000), 0) for name, value in values.items()]


def _data(table: pd.DataFrame, context: str) -> DatasetInput:
    path = TRAIN if context == "training" else TRAIN.with_name("eval.parquet")
    data = mlflow.data.from_pandas(table, source=str(path), name=path.stem, digest=md5(path))
    return DatasetInput(Dataset.from_dictionary(data.to_dict()), [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _git_tags() -> dict[str, str]:
    revision, dirty = commit()
    return {"git_commit": revision, "git_dirty": str(dirty).lower()}
