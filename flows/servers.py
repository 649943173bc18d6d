"""Start and stop the servers for schedules and forms: `make up`, `make down`.

Prefect's server, MLflow's server and one worker run in the background and listen on the loopback interface only.
`.servers/` has their logs and records. A process is stopped only if its id, command and folder match a record.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas import filters
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from flows.artifacts import MLFLOW_PAGES
from flows.processes import TAIL_LINES, kill_after_grace, search_path, send_signal, stop_tree
from tasks.common.paths import MLFLOW_STORE
from tasks.common.runner import run
from tasks.tracking.provenance import FLOW_RUN

FOLDER = Path(".servers")
HOST = "127.0.0.1"
POOL = "dpo"
PREFECT, MLFLOW, WORKER = "prefect", "mlflow", "worker"
WORKSPACE = "DPO_WORKSPACE"
WORKERS_RUN = "PREFECT__FLOW_RUN_ID"  # set by Prefect's worker for the process of a flow run; stages inherit it
START_SECONDS = 120.0
IN_POOL = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[POOL]))
echo = partial(print, flush=True)


@dataclass(frozen=True)
class Server:
    """One background process, as recorded in `.servers/NAME.json`."""

    name: str
    pid: int
    command: list[str]
    url: str  # for the worker: of Prefect's server

    def process(self) -> psutil.Process | None:
        """Return the process if the one with this id has the recorded command and folder."""
        try:
            process = psutil.Process(self.pid)
            command = process.cmdline()  # empty for a moment while the process starts
            same = (not command or command[1:] == self.command[1:]) and process.cwd() == str(Path.cwd())
            return process if same else None
        except psutil.Error:
            return None


def find(name: str) -> Server | None:
    """Return the server of this name if it runs for this folder."""
    record = FOLDER / f"{name}.json"
    server = Server(**json.loads(record.read_text())) if record.exists() else None
    return server if server and server.process() else None


def start(name: str, url: str, *arguments: str, env: dict[str, str]) -> Server:
    """Start `python -m ARGUMENTS` as a background process, unless it runs already."""
    if server := find(name):
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


def await_health(server: Server, healthy: Callable[[], bool]) -> None:
    """Wait until the server is healthy. Raise InputError with the end of its log if it exits or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not healthy():
        if server.process() is None or time.monotonic() > deadline:
            log = FOLDER / f"{server.name}.log"
            tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            raise InputError("\n".join([f"{server.name} did not start; last lines of {log}:", *tail]))
        time.sleep(0.2)


def is_healthy(url: str) -> bool:
    """Return whether a GET of this address succeeds."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def address(name: str, variable: str, default: int) -> str:
    """Return the address of a server. Raise InputError if its port is invalid or used by another program."""
    if server := find(name):
        return server.url
    port = os.environ.get(variable) or str(default)
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"{variable}={port}: not a port; give a number from 1 to 65535")
    with socket.socket() as probe:
        if probe.connect_ex((HOST, int(port))) == 0:
            raise InputError(f"port {port} is used by another program; choose another: make up {variable}=PORT")
    return f"http://{HOST}:{port}"


def end_orphans(client: SyncPrefectClient) -> None:
    """Stop processes that a lost worker left; mark its flow runs as crashed, so that they free the only slot."""
    variables = {process: process.info["environ"] or {} for process in psutil.process_iter(["environ"])}
    here = str(Path.cwd())
    left = {process for process, env in variables.items() if env.get(WORKSPACE) == here and WORKERS_RUN in env}
    flows = {process for process in left if FLOW_RUN not in variables[process]}
    send_signal(signal.SIGTERM, flows or left)  # a flow stops its own stages
    kill_after_grace(left)
    active = filters.FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    runs = filters.FlowRunFilter(state=filters.FlowRunFilterState(type=active))
    for orphan in client.read_flow_runs(flow_run_filter=runs, work_pool_filter=IN_POOL):
        client.set_flow_run_state(orphan.id, Crashed(message="the worker was stopped"), force=True)
        echo(f"{WORKER:8} was stopped during flow run {orphan.name}, which is now marked as crashed")


def register(client: SyncPrefectClient, env: dict[str, str]) -> None:
    """Register the deployments of `prefect.yaml` and remove all other schedules. Keep paused deployments paused.

    `prefect deploy` itself keeps the schedules of a deployment whose list is now empty, and resumes paused ones.
    Raises InputError with Prefect's output if Prefect rejects a deployment.
    """
    paused = [
        deployment.id for deployment in client.read_deployments(work_pool_filter=IN_POOL) if deployment.paused
    ]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    here = {name: value for name, value in env.items() if name != WORKSPACE}  # each worker has its own folder
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    for identity in paused:
        client.pause_deployment(identity)
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        raise InputError(f"prefect.yaml: the deployments were not registered:\n{output}")
    declared = YAML(typ="safe").load(Path("prefect.yaml"))["deployments"]
    unscheduled = {entry["name"] for entry in declared if not (entry.get("schedules") or entry.get("schedule"))}
    for deployment in client.read_deployments(work_pool_filter=IN_POOL):
        for extra in deployment.schedules if deployment.name in unscheduled else []:
            client.delete_deployment_schedule(deployment.id, extra.id)
            echo(f"{deployment.name:8} removed a schedule that is not in prefect.yaml")


def has_heartbeat(client: SyncPrefectClient, since: datetime) -> bool:
    """Return whether the worker has sent a heartbeat to the server after a time."""
    workers = client.read_workers_for_work_pool(POOL)
    return any(worker.last_heartbeat_time and worker.last_heartbeat_time > since for worker in workers)


def up() -> None:
    """Start the servers and the worker if they do not run, and register the deployments of `prefect.yaml`.

    If MLFLOW_TRACKING_URI is the address of a server, that server is used and no MLflow is started. Raises
    InputError if a port is in use, a server does not start, or a deployment is rejected; servers that were started
    until then continue to run.
    """
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    prefect_url = address(PREFECT, "PREFECT_PORT", 4200)
    store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
    remote = store.startswith(("http://", "https://"))
    mlflow_url = store if remote else address(MLFLOW, "MLFLOW_PORT", 5000)
    env = {
        **os.environ,
        "PATH": search_path(),
        "PREFECT_API_URL": f"{prefect_url}/api",
        WORKSPACE: str(Path.cwd()),
        MLFLOW_PAGES: mlflow_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves seven processes that no stage uses
    }

    listen = ["--host", HOST, "--port", prefect_url.rpartition(":")[2]]
    prefect = start(PREFECT, prefect_url, "prefect", "server", "start", *listen, env=env)
    if not remote:
        listen = ["--host", HOST, "--port", mlflow_url.rpartition(":")[2], "--workers", "1"]
        arguments = ["mlflow", "server", "--backend-store-uri", store, *listen]
        mlflow = start(MLFLOW, mlflow_url, *arguments, env=env)
        await_health(mlflow, lambda: is_healthy(f"{mlflow_url}/health"))
    await_health(prefect, lambda: is_healthy(f"{prefect_url}/api/health"))

    with SyncPrefectClient(f"{prefect_url}/api") as client:
        template = ProcessWorker.get_default_base_job_template()  # one flow at a time: all write the same folder
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(
                WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=1)
            )
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
        if process := server and server.process():
            stop_tree(process, graceful=name != WORKER)
        echo(f"{name:8} {'stopped' if process else 'is not running'}")
        (FOLDER / f"{name}.json").unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.servers", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    run(up if parser.parse_args().action == "up" else down)
