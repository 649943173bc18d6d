"""Connect to MLflow, or to a local offline store while the server is unreachable, and sync the store later.

A server can be down when a stage starts and can fail during a training. The next stage that reaches the server
uploads what the offline store holds.
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

import mlflow
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from sqlalchemy import create_engine
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from tasks.common.addresses import shown, without_credentials
from tasks.common.git import head_commit, inputs_changed
from tasks.common.paths import CHECKOUT, MLFLOW_STORE
from tasks.tracking.relocation import relocate

EXPERIMENT = "dpo-pipeline"
SWEEP, CHECKPOINT, ROLE, TRIAL = "dpo.sweep", "dpo.checkpoint", "dpo.role", "dpo.trial"
OFFLINE_STORE = f"{MLFLOW_STORE}.offline"
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make mlflow` serves the UI."""
OFFLINE_RUN = "dpo.offline_run"
"""Tag of a run on the server: its id in the offline store, which the provenance of its checkpoint names."""
CONTINUES, SYNCED = "dpo.continues", "dpo.synced"
"""Tags of runs in the offline store: the server's run that they continue; their end time when they were synced."""
KEPT_TAGS = ("git_", "mlflow.source.", "mlflow.user", MLFLOW_RUN_NAME, MLFLOW_PARENT_RUN_ID)
"""Prefixes of tags that are set when a run is created on the server; a sync does not overwrite them."""
CALL_SECONDS, SYNC_SECONDS = 5, 60
REASON_LENGTH = 300

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def connect() -> None:
    """Use MLFLOW_TRACKING_URI or `mlflow.db`. Raise InputError if the server does not answer."""
    if not connect_or_offline():
        store = shown(os.environ["MLFLOW_TRACKING_URI"])
        raise InputError(
            f"MLFLOW_TRACKING_URI: {store}: connection refused or timed out; start that server, or use the local "
            "store: `unset MLFLOW_TRACKING_URI`, `make up`"
        )


def connect_or_offline() -> bool:
    """Use MLFLOW_TRACKING_URI or `mlflow.db`, and sync the offline store; if that fails, use the offline store.

    Return False if the offline store is in use.

    Raises:
        InputError: MLflow refuses, for example because the experiment is deleted, or the store is of another kind.
    """
    store = _store()
    try:
        with _request_limits(CALL_SECONDS):
            _use(store)
        if _is_server(store) and Path(OFFLINE_STORE.removeprefix("sqlite:///")).exists():
            sync()
    except (MlflowException, OSError, SQLAlchemyError, ModuleNotFoundError) as error:
        status = error.get_http_status_code() if isinstance(error, MlflowException) else 500
        if isinstance(error, OSError) and not _is_server(store):
            raise  # of the disk
        if not _is_server(store) or status < 500:
            raise InputError(_refusal(store, error)) from error
        _use_offline_store(store, error)
        return False
    return True


def _store() -> str:
    """Return MLFLOW_TRACKING_URI or the local store. User and password of a server move to variables of their own.

    MLflow prints the address of a run's page, which therefore must not contain them.
    """
    store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
    parts = urlsplit(store)
    if not _is_server(store) or parts.username is None:
        return store
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    os.environ["MLFLOW_TRACKING_URI"] = shown(store)
    return shown(store)


def _refusal(store: str, error: Exception) -> str:
    """Return one line that says why MLflow refuses, and the command that fixes it."""
    address = shown(store)
    if isinstance(error, ModuleNotFoundError):
        fix = "`pip install -e '.[postgresql]'`, and write postgresql+pg8000://USER:PASSWORD@HOST/DATABASE"
        return f"MLFLOW_TRACKING_URI: {address}: the driver {error.name} is not installed; {fix}"
    reason = re.sub(r'user "[^"]*"', "user", " ".join(without_credentials(str(error)).split()))
    if "deleted experiment" in reason:
        with _request_limits(CALL_SECONDS):
            found = MlflowClient().get_experiment_by_name(EXPERIMENT)
        number = found.experiment_id if found else "ID"
        variable = "" if "MLFLOW_TRACKING_URI" in os.environ else f"MLFLOW_TRACKING_URI={MLFLOW_STORE} "
        fix = f"restore it: `{variable}mlflow experiments restore --experiment-id {number}`"
        return f"MLflow at {address}: the experiment {EXPERIMENT} is deleted; {fix}"
    if "filesystem tracking backend" in reason:
        fix = "use the local database, `unset MLFLOW_TRACKING_URI`; `mlflow migrate-filestore` copies earlier runs"
        return f"MLFLOW_TRACKING_URI: {address}: MLflow no longer supports a folder as a store; {fix}"
    fix = "check MLFLOW_TRACKING_URI, user and password with `mlflow experiments search`"
    return f"MLflow at {address} refuses: {reason[:REASON_LENGTH]}; {fix}"


def _use(store: str) -> None:
    mlflow.set_tracking_uri(store)
    with store_lock(), chdir(CHECKOUT):  # MLflow places artifacts below the current folder
        path = Path(store.removeprefix("sqlite:///"))
        if store.startswith("sqlite:///") and not path.exists():
            with atomic_write(path) as tmp:  # MLflow cannot repair a store whose creation was interrupted
                MlflowClient(f"sqlite:///{tmp.absolute()}").search_experiments(max_results=1)
        if store.startswith("sqlite:///"):
            relocate(path)
        elif re.split("[+:]", store)[0] in DATABASE_ENGINES:
            _check_database(store)
        mlflow.set_experiment(EXPERIMENT)
        mlflow.set_experiment_tag("mlflow.experimentKind", "custom_model_development")  # show runs, not traces


def _check_database(store: str) -> None:
    """Log in to a database once, because MLflow tries a wrong password ten times, which takes two minutes.

    Raises:
        SQLAlchemyError: the database refuses. One that cannot be reached is left to MLflow, which tries again.
    """
    engine = create_engine(store)
    try:
        engine.connect().close()
    except (InterfaceError, OperationalError) as error:
        log.warning("%s: %s; trying again", shown(store), without_credentials(str(error.orig)))
    finally:
        engine.dispose()


def store_lock() -> FileLock:
    """Return the lock for creating a store or a sweep's run; the process that holds it can acquire it again."""
    return FileLock(CHECKOUT / "mlflow.db.lock", is_singleton=True)


def _use_offline_store(store: str, error: Exception) -> None:
    if mlflow.get_tracking_uri() != OFFLINE_STORE:
        reason = without_credentials(str(error))
        log.warning("MLflow at %s is unreachable; logging to %s: %s", shown(store), OFFLINE_STORE, reason)
    _use(OFFLINE_STORE)
    os.environ["MLFLOW_TRACKING_URI"] = store  # set_tracking_uri changed it


def page(experiment_id: str, path: str) -> str:
    """Return the address of a page of an experiment in the server's UI, or in the UI that `make mlflow` starts."""
    store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
    site = shown(store).rstrip("/") if _is_server(store) else LOCAL_UI
    return f"{site}/#/experiments/{experiment_id}/{path}"


def _is_server(store: str) -> bool:
    return store.startswith(("http://", "https://"))


@contextmanager
def _request_limits(seconds: int) -> Iterator[None]:
    """Limit a request to a server to two retries and this timeout; MLflow's defaults retry for minutes."""
    settings = {"MAX_RETRIES": "2", "BACKOFF_FACTOR": "1", "TIMEOUT": str(seconds)}
    names = {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in settings.items()}
    added = {name: value for name, value in names.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def or_offline(call: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that calls MLflow: if the server fails, call it again with the offline store in use."""

    @functools.wraps(call)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        store = mlflow.get_tracking_uri()
        try:
            with _request_limits(CALL_SECONDS):
                return call(*args, **kwargs)
        except (MlflowException, OSError) as error:
            if not _is_server(store):
                raise
            _use_offline_store(store, error)
            return call(*args, **kwargs)

    return wrapper


def search(client: MlflowClient, query: str = "") -> list[Run]:
    """Return the project's runs that match an MLflow query, latest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id], query, max_results=10_000)) if experiment else []


@or_offline
def new_run(name: str, tags: dict[str, str]) -> str:
    """Create a run with tags for user, command and commit; return its id."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    tags = resolve_tags({"git_commit": head_commit(), "git_dirty": str(inputs_changed()).lower(), **tags})
    return str(client.create_run(experiment.experiment_id, run_name=name, tags=tags).info.run_id)


def sync() -> None:
    """Upload the runs of the offline store to the server. An interrupted sync continues at the next call.

    A run that the server refuses stays in the offline store, with a warning.
    """
    offline, server = MlflowClient(OFFLINE_STORE), MlflowClient()
    with FileLock(CHECKOUT / "mlflow.db.offline.lock"), _request_limits(SYNC_SECONDS):
        runs = [run for run in search(offline) if run.data.tags.get(SYNCED) != str(run.info.end_time)]
        for run in sorted(runs, key=lambda run: (run.data.tags.get(ROLE) != "sweep", run.info.start_time)):
            try:
                _sync_run(offline, server, run)
            except MlflowException as error:
                if error.get_http_status_code() >= 500:
                    raise
                log.warning(
                    "MLflow refuses run %s; it stays in %s: %s",
                    run.info.run_id,
                    OFFLINE_STORE,
                    without_credentials(str(error)),
                )


def _sync_run(offline: MlflowClient, server: MlflowClient, run: Run) -> None:
    info, tags = run.info, {k: v for k, v in run.data.tags.items() if k not in (CONTINUES, SYNCED)}
    target = _server_run(server, run)
    if target is None:
        parent = search(offline, f"attributes.run_id = '{tags.get(MLFLOW_PARENT_RUN_ID)}'")
        if parent:
            tags[MLFLOW_PARENT_RUN_ID] = _server_run(server, parent[0])
        experiment = server.get_experiment_by_name(EXPERIMENT)
        new_tags = tags | {OFFLINE_RUN: info.run_id}
        target = server.create_run(experiment.experiment_id, info.start_time, new_tags, info.run_name).info.run_id
    known = server.get_run(target).data.params
    server.log_batch(
        target,
        params=[Param(k, v) for k, v in run.data.params.items() if k not in known],
        tags=[RunTag(k, v) for k, v in tags.items() if not k.startswith(KEPT_TAGS)],
    )
    points = [point for key in run.data.metrics for point in offline.get_metric_history(info.run_id, key)]
    server.log_batch(target, metrics=[Metric(p.key, p.value, p.timestamp, p.step) for p in points])
    if run.inputs.dataset_inputs:
        server.log_inputs(target, run.inputs.dataset_inputs)
    if offline.list_artifacts(info.run_id):
        server.log_artifacts(target, offline.download_artifacts(info.run_id, ""))
    if info.status != "RUNNING":
        server.set_terminated(target, info.status, info.end_time)
    if server.get_run(target).info.status != "RUNNING":  # also if the next run of its stage marked it as killed
        offline.set_tag(info.run_id, SYNCED, str(info.end_time))


def _server_run(server: MlflowClient, run: Run) -> str | None:
    """Return the id of the server's run to which a run of the offline store belongs."""
    tags = run.data.tags
    queries = [f"tags.`{OFFLINE_RUN}` = '{run.info.run_id}'"]
    if CONTINUES in tags:
        queries.insert(0, f"attributes.run_id = '{tags[CONTINUES]}'")
    if tags.get(ROLE) == "sweep":
        queries.append(f"tags.`{SWEEP}` = '{tags[SWEEP]}' and tags.`{ROLE}` = 'sweep'")
    elif CHECKPOINT in tags and not any(key.startswith("train/") for key in run.data.metrics):
        same = (f"tags.`{name}` = '{tags[name]}'" for name in (CHECKPOINT, ROLE, TRIAL) if name in tags)
        queries.append(" and ".join(same))  # evaluated offline, trained on the server
    return next((str(found[0].info.run_id) for query in queries if (found := search(server, query))), None)
