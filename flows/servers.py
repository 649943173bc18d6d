"""Start and stop the servers for schedules and forms: `make up`, `make down`.

Prefect's server, MLflow's server and one worker run in the background and listen on the loopback interface only.
`.servers/` has their logs and records. A process is stopped only if its id, command and folder match a record.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from flows.artifacts import MLFLOW_PAGES
from flows.processes import TAIL_LINES, kill_after_grace, stop_tree, terminate
from tasks.common.paths import MLFLOW_STORE
from tasks.common.runner import run
from tasks.tracking.provenance import FLOW_RUN

FOLDER = Path(".servers")
HOST = "127.0.0.1"
POOL = "dpo"
PREFECT, MLFLOW, WORKER = "prefect", "mlflow", "worker"
WORKSPACE = "DPO_WORKSPACE"
WORKERS_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect's worker sets for the process of a flow run; its stages inherit it."""
START_SECONDS, POLL_SECONDS = 120.0, 0.2
ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


@dataclass(frozen=True)
class Server:
    """One background process, as recorded in `.servers/NAME.json`."""

    name: str
    pid: int
    command: list[str]
    url: str
    """Address that it listens on; for the worker, the address of Prefect's server."""

    def process(self) -> psutil.Process | None:
        """Return the process if the one with this id has the recorded command and folder."""
        try:
            process = psutil.Process(self.pid)
            command = process.cmdline()  # empty for a moment while the process starts
            same = (not command or command[1:] == self.command[1:]) and process.cwd() == str(Path.cwd())
        except psutil.Error:
            return None
        return process if same else None


def find(name: str) -> Server | None:
    """Return the server of this name if it runs for this folder."""
    record = FOLDER / f"{name}.json"
    server = Server(**json.loads(record.read_text())) if record.exists() else None
    return server if server and server.process() else None


def start(name: str, url: str, *arguments: str, env: dict[str, str]) -> Server:
    """Start `python -m ARGUMENTS` as a background process, unless it runs already."""
    server = find(name)
    if server is not None:
        echo(f"{name:8} is already running at {server.url}")
        return server
    command = [sys.executable, "-m", *arguments]
    with (FOLDER / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
    server = Server(name, process.pid, command, url)
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(server), indent=2) + "\n")
    echo(f"{name:8} starting at {url}")
    return server


def environment(prefect_url: str, mlflow_url: str) -> dict[str, str]:
    """Return the environment of a process that uses these servers, this folder and this Python."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PREFECT_API_URL": f"{prefect_url}/api",
        WORKSPACE: str(Path.cwd()),
        MLFLOW_PAGES: mlflow_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves seven processes that no stage uses
    }


def await_health(server: Server, healthy: Callable[[], bool]) -> None:
    """Wait until the server is healthy.

    Raises:
        InputError: the server ended, or is not healthy in time; the message has the last lines of its log.
    """
    deadline = time.monotonic() + START_SECONDS
    while not healthy():
        if server.process() is None or time.monotonic() > deadline:
            log = FOLDER / f"{server.name}.log"
            tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            raise InputError("\n".join([f"{server.name} did not start; last lines of {log}:", *tail]))
        time.sleep(POLL_SECONDS)


def is_healthy(url: str) -> bool:
    """Return whether a GET of this address succeeds."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def address(name: str, variable: str, default: int) -> str:
    """Return the address of a server that runs, else the one that it will have.

    Raises:
        InputError: the variable is not a port, or another program uses the port.
    """
    server = find(name)
    if server is not None:
        return server.url
    port = os.environ.get(variable) or str(default)
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"{variable}={port}: not a port; give a number from 1 to 65535")
    with socket.socket() as probe:
        if probe.connect_ex((HOST, int(port))) == 0:
            raise InputError(f"port {port} is used by another program; choose another: make up {variable}=PORT")
    return f"http://{HOST}:{port}"


def make_pool(client: SyncPrefectClient) -> None:
    """Create the work pool if it does not exist. It runs one flow at a time: all flows write the same folder."""
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=1)
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)


def end_orphans(client: SyncPrefectClient) -> None:
    """Mark orphaned flow runs as crashed so that they free the pool's only slot. Call it while no worker runs.

    Processes that a lost worker left running here are stopped first, so that they do not disturb the next run.
    """
    left = flow_run_processes()
    flows = {process for process, is_stage in left.items() if not is_stage}
    terminate(flows or left)  # a flow stops its own stages
    kill_after_grace(set(left))
    orphans = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )
    for orphan in orphans:
        client.set_flow_run_state(orphan.id, Crashed(message="the worker was stopped"), force=True)
        echo(f"{WORKER:8} was stopped during flow run {orphan.name}, which is now marked as crashed")


def register(client: SyncPrefectClient, env: dict[str, str]) -> None:
    """Register the deployments of `prefect.yaml` and remove all other schedules. Keep paused deployments paused.

    `prefect deploy` itself keeps the schedules of a deployment whose list is now empty, and resumes paused ones.

    Raises:
        InputError: Prefect rejects a deployment; the message has its output.
    """
    paused = [deployment.id for deployment in deployed(client) if deployment.paused]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    here = {name: value for name, value in env.items() if name != WORKSPACE}  # each worker has its own folder
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    for identity in paused:
        client.pause_deployment(identity)
    if done.returncode:
        raise InputError(
            f"prefect.yaml: the deployments were not registered:\n{(done.stdout + done.stderr).strip()}"
        )
    declared = YAML(typ="safe").load(Path("prefect.yaml"))["deployments"]
    unscheduled = {entry["name"] for entry in declared if not (entry.get("schedules") or entry.get("schedule"))}
    for deployment in deployed(client):
        for extra in deployment.schedules if deployment.name in unscheduled else []:
            client.delete_deployment_schedule(deployment.id, extra.id)
            echo(f"{deployment.name:8} removed a schedule that is not in prefect.yaml")


def deployed(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Return the deployments of the pool."""
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    return client.read_deployments(work_pool_filter=pool)


def has_heartbeat(client: SyncPrefectClient, since: datetime) -> bool:
    """Return whether the worker has sent a heartbeat to the server after a time."""
    beats = [worker.last_heartbeat_time for worker in client.read_workers_for_work_pool(POOL)]
    return any(beat is not None and beat > since for beat in beats)


def up() -> None:
    """Start the servers and the worker if they do not run, and register the deployments of `prefect.yaml`.

    If MLFLOW_TRACKING_URI is the address of a server, that server is used and no MLflow is started.

    Raises:
        InputError: a port is in use, a server did not start, or a deployment was rejected. Servers that were
            started until then continue to run.
    """
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    prefect_url = address(PREFECT, "PREFECT_PORT", 4200)
    store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
    remote = store.startswith(("http://", "https://"))
    mlflow_url = store if remote else address(MLFLOW, "MLFLOW_PORT", 5000)
    env = environment(prefect_url, mlflow_url)

    listen = ["--host", HOST, "--port", prefect_url.rpartition(":")[2]]
    prefect = start(PREFECT, prefect_url, "prefect", "server", "start", *listen, env=env)
    if not remote:
        listen = ["--host", HOST, "--port", mlflow_url.rpartition(":")[2], "--workers", "1"]
        arguments = ["mlflow", "server", "--backend-store-uri", store, *listen]
        mlflow = start(MLFLOW, mlflow_url, *arguments, env=env)
        await_health(mlflow, lambda: is_healthy(f"{mlflow_url}/health"))
    await_health(prefect, lambda: is_healthy(f"{prefect_url}/api/health"))

    with SyncPrefectClient(f"{prefect_url}/api") as client:
        make_pool(client)
        starting, since = find(WORKER) is None, datetime.now(UTC)
        if starting:
            end_orphans(client)
        arguments = ["prefect", "worker", "start", "--pool", POOL, "--name", POOL]
        worker = start(WORKER, prefect_url, *arguments, env=env)
        register(client, env)
        if starting:
            await_health(worker, lambda: has_heartbeat(client, since))
    echo(f"\nPrefect: flows, schedules, forms      {prefect_url}/deployments")
    echo(f"MLflow: experiments, models           {mlflow_url}")
    echo(f"To use this Prefect server in a shell: export PREFECT_API_URL={prefect_url}/api")


def down() -> None:
    """Stop the processes that `up` started, with their child processes. Stored data is kept."""
    for name in (WORKER, MLFLOW, PREFECT):
        server = find(name)
        process = server and server.process()
        if process is None:
            echo(f"{name:8} is not running")
        else:
            stop_tree(process, graceful=name != WORKER)
            echo(f"{name:8} stopped")
        (FOLDER / f"{name}.json").unlink(missing_ok=True)


def flow_run_processes() -> dict[psutil.Process, bool]:
    """Return the processes of flow runs that a worker of this folder started, and whether each is of a stage."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if variables.get(WORKSPACE) == str(Path.cwd()) and WORKERS_RUN in variables:
                found[process] = FLOW_RUN in variables
    return found


def echo(message: str) -> None:
    """Print a message at once."""
    print(message, flush=True)  # noqa: T201


def main() -> None:
    """Run the action that the only argument names."""
    parser = argparse.ArgumentParser(prog="python -m flows.servers", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    up() if parser.parse_args().action == "up" else down()


if __name__ == "__main__":
    run(main)
