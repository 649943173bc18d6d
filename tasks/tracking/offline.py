"""Where MLflow's records go: to its server or file; while the server does not answer, to a local store, the spool.

A server may be down when a stage starts, or fail in the middle of a training. The next stage that finds it
delivers what the spool holds.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import mlflow
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from tasks.common.paths import MLFLOW_STORE
from tasks.tracking.provenance import commit

EXPERIMENT = "dpo-pipeline"
SWEEP, CHECKPOINT, ROLE = "dpo.sweep", "dpo.checkpoint", "dpo.role"
SPOOL = f"{MLFLOW_STORE}.spool"
SPOOLED = "dpo.spooled"
"""The id that a server's run had in the spool; the provenance of its checkpoint names it."""
CONTINUES, DELIVERED = "dpo.continues", "dpo.delivered"
"""Of runs in the spool: the server's run that goes on there; the end time with which a run was delivered."""
OF_BEGINNING = ("git_", "mlflow.source.", "mlflow.user", MLFLOW_RUN_NAME, MLFLOW_PARENT_RUN_ID)
"""Beginnings of the tags that a run on the server keeps, whatever is added to it."""
CALL_SECONDS, DELIVERY_SECONDS = 5, 60

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def connect() -> None:
    """Use MLFLOW_TRACKING_URI or `mlflow.db` here, for what cannot wait: models and which one is the champion.

    Raises:
        InputError: the server does not answer.
    """
    if not connect_or_offline():
        store = os.environ["MLFLOW_TRACKING_URI"]
        raise InputError(f"MLFLOW_TRACKING_URI: {store}: connection refused or timed out; start MLflow, try again")


def connect_or_offline() -> bool:
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
    with store_lock():
        _create(store)
        mlflow.set_experiment(EXPERIMENT)
        mlflow.set_experiment_tag("mlflow.experimentKind", "custom_model_development")  # runs, not traces


def _create(store: str) -> None:
    """A new SQLite store, whole or not at all: one whose making was killed is of no use, nor mended by MLflow."""
    path = Path(store.removeprefix("sqlite:///"))
    if store.startswith("sqlite:///") and not path.exists():
        with atomic_write(path) as tmp:
            MlflowClient(f"sqlite:///{tmp}").search_experiments(max_results=1)


def store_lock() -> FileLock:
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


def reliable(call: Callable[P, T]) -> Callable[P, T]:
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


@reliable
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
    found = search(client, f"attributes.run_id = '{run_id}'") or search(client, going_on)
    return found[0].info.run_id if found else new_run("continued", {CONTINUES: run_id})


def search(client: MlflowClient, wanted: str = "") -> list[Run]:
    """The project's runs that meet a condition of MLflow's search, latest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], wanted, max_results=10_000)) if experiment else []


@reliable
def new_run(name: str, tags: dict[str, str]) -> str:
    """The id of a new run, with tags that tell user, command and commit."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    run = client.create_run(experiment.experiment_id, run_name=name, tags=resolve_tags(git_tags() | tags))
    return str(run.info.run_id)


def deliver() -> None:
    """Bring what the spool holds to the server; can be cut off at any point, and then goes on the next time.

    A run that the server refuses stays in the spool, with a warning.
    """
    spool, server = MlflowClient(SPOOL), MlflowClient()
    with FileLock("mlflow.db.spool.lock"), _patience(DELIVERY_SECONDS):
        runs = [run for run in search(spool) if run.data.tags.get(DELIVERED) != str(run.info.end_time)]
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
        parent = search(spool, f"attributes.run_id = '{tags.get(MLFLOW_PARENT_RUN_ID)}'")
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
    return next((str(found[0].info.run_id) for query in wanted if (found := search(server, query))), None)


def git_tags() -> dict[str, str]:
    """The code that a run was made with."""
    revision, dirty = commit()
    return {"git_commit": revision, "git_dirty": str(dirty).lower()}
