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
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import VariableCreate, VariableUpdate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.config import load_params
from flows.identity import PROJECT, project
from flows.processes import TAIL_LINES, kill_after_grace, search_path, send_signal, stop_tree
from flows.slots import WORKERS_RUN, active_runs, in_pool, release_slots, skip_missed, variables_of_processes
from tasks.common.addresses import MLFLOW_PAGES, shown
from tasks.common.paths import MLFLOW_STORE
from tasks.common.runner import run
from tasks.tracking.provenance import FLOW_RUN
from tasks.tracking.relocation import WORKSPACE, relocate

FOLDER = Path(".servers")
HOST = "127.0.0.1"
PREFECT, MLFLOW, WORKER = "prefect", "mlflow", "worker"
OWNER = "dpo_checkout"
"""Variable in Prefect's database: the checkout to which it belongs."""
START_SECONDS = 120.0
SILENT_SECONDS = 150.0  # a worker sends a heartbeat every 30 seconds
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
    umask = -1 if name == WORKER else 0o077  # logs and databases of servers are readable for this user only
    with (FOLDER / f"{name}.log").open("ab") as log:
        os.fchmod(log.fileno(), 0o600)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True, umask=umask
        )
    server = Server(name, process.pid, command, url)
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(server) | {"url": shown(url)}, indent=2) + "\n")
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
    here = str(Path.cwd())
    left = {
        process: variables
        for process, variables in variables_of_processes()
        if variables.get(WORKSPACE) == here and WORKERS_RUN in variables
    }
    flows = {process for process, variables in left.items() if FLOW_RUN not in variables}
    send_signal(signal.SIGTERM, flows or left)  # a flow stops its own stages
    kill_after_grace(set(left))
    for orphan in active_runs(client, project()):
        client.set_flow_run_state(orphan.id, Crashed(message="the worker was stopped"), force=True)
        echo(f"{WORKER:8} was stopped during flow run {orphan.name}, which is now marked as crashed")


def claim_database(client: SyncPrefectClient) -> None:
    """Record in Prefect's database that it belongs to this checkout. Raise InputError if it is another's."""
    here, owner = str(Path.cwd()), client.read_variable_by_name(OWNER)
    value: Any = {"project": project(), "folder": here}
    if owner is None:
        client.create_variable(VariableCreate(name=OWNER, value=value))
        return
    known: Any = owner.value
    url: Any = get_current_settings().server.database.connection_url
    kind, _, path = (url.get_secret_value() if url else "").partition(":///")
    inside = kind.startswith("sqlite") and Path(path).absolute().is_relative_to(here)
    if known["project"] != project() and known["folder"] != here and not inside:
        raise InputError(
            f"Prefect's database belongs to another checkout, {known['folder']}; use that of this checkout: "
            "`unset PREFECT_HOME PREFECT_SERVER_DATABASE_CONNECTION_URL PREFECT_API_DATABASE_CONNECTION_URL`, "
            "then `make up`"
        )
    if known != value:
        client.update_variable(VariableUpdate(name=OWNER, value=value))


def register(client: SyncPrefectClient, env: dict[str, str]) -> None:
    """Register the deployments of `prefect.yaml` and remove all other schedules. Keep paused deployments paused.

    `prefect deploy` itself keeps the schedules of a deployment whose list is now empty, and resumes paused ones.
    Raises InputError with Prefect's output if Prefect rejects a deployment.
    """
    paused = [each.id for each in client.read_deployments(work_pool_filter=in_pool(project())) if each.paused]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    here = {name: value for name, value in env.items() if name != WORKSPACE}  # each worker sets its own
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    for identity in paused:
        client.pause_deployment(identity)
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        raise InputError(f"prefect.yaml: the deployments were not registered:\n{output}")
    declared = YAML(typ="safe").load(Path("prefect.yaml"))["deployments"]
    scheduled = {entry["entrypoint"] for entry in declared if entry.get("schedules") or entry.get("schedule")}
    entrypoints = {entry["entrypoint"] for entry in declared}
    for deployment in client.read_deployments():
        if deployment.entrypoint not in entrypoints:
            continue
        if deployment.work_pool_name != project():  # of a copied database
            client.delete_deployment(deployment.id)
            continue
        for extra in deployment.schedules if deployment.entrypoint not in scheduled else []:
            client.delete_deployment_schedule(deployment.id, extra.id)
            flow = str(deployment.entrypoint).rpartition(":")[2]
            echo(f"{flow:8} removed a schedule that is not in prefect.yaml")


def has_heartbeat(client: SyncPrefectClient, since: datetime) -> bool:
    """Return whether the worker has sent a heartbeat to the server after a time."""
    workers = client.read_workers_for_work_pool(project())
    return any(worker.last_heartbeat_time and worker.last_heartbeat_time > since for worker in workers)


def up() -> None:
    """Start the servers and the worker if they do not run, and register the deployments of `prefect.yaml`.

    If MLFLOW_TRACKING_URI is the address of a server, that server is used and no MLflow is started. Raises
    InputError if a port is in use, a server does not start, Prefect's database is another checkout's, or a
    deployment is rejected; servers that were started until then continue to run.
    """
    FOLDER.mkdir(exist_ok=True)
    FOLDER.chmod(0o700)
    (FOLDER / ".gitignore").write_text("*\n")
    check_place()
    prefect_url = address(PREFECT, "PREFECT_PORT", 4200)
    store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
    remote = store.startswith(("http://", "https://"))
    mlflow_url = store if remote else address(MLFLOW, "MLFLOW_PORT", 5000)
    env = {
        **os.environ,
        "PATH": search_path(),
        "PREFECT_API_URL": f"{prefect_url}/api",
        WORKSPACE: str(Path.cwd()),
        PROJECT: project(),
        MLFLOW_PAGES: mlflow_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves seven processes that no stage uses
    }
    runs_already = find(PREFECT) is not None
    listen = ["--host", HOST, "--port", prefect_url.rpartition(":")[2]]
    prefect = start(PREFECT, prefect_url, "prefect", "server", "start", *listen, env=env)
    if not remote:
        start_mlflow(store, mlflow_url, env)
    await_health(prefect, lambda: is_healthy(f"{prefect_url}/api/health"))
    with SyncPrefectClient(f"{prefect_url}/api") as client:
        try:
            claim_database(client)
        except InputError:
            if not runs_already:
                stop(PREFECT)
            raise
        start_worker(client, prefect_url, env)
    name = project()
    echo(f"\nPrefect: flows, schedules, forms      {prefect_url}/deployments")
    echo(f"MLflow: experiments, models           {shown(mlflow_url)}")
    echo(f"Deployments: pipeline/{name}, retrain/{name}, sweep/{name}, rollback/{name}")
    echo(f"To use this Prefect server in a shell: export PREFECT_API_URL={prefect_url}/api")


def check_place() -> None:
    """Report servers of this checkout that run from another folder, because it was moved or copied.

    Raises:
        InputError: this folder was moved while its servers ran; they write to the former place.
    """
    here = str(Path.cwd())
    for name in (PREFECT, MLFLOW, WORKER):
        record = FOLDER / f"{name}.json"
        if not record.exists():
            continue
        pid = json.loads(record.read_text())["pid"]
        with suppress(psutil.Error):
            place = psutil.Process(pid).environ().get(WORKSPACE, here)
            if place == here:
                continue
            if find(name):
                raise InputError(
                    f"{name} (process {pid}) was started in {place}, before this folder was moved; run "
                    "`make down`, then `make up`"
                )
            echo(f"{name:8} of {place}, from which this folder was copied, still runs there: process {pid}")


def start_mlflow(store: str, url: str, env: dict[str, str]) -> None:
    """Start MLflow's server, after the paths in its store were updated."""
    if store.startswith("sqlite:///") and find(MLFLOW) is None:
        relocate(Path(store.removeprefix("sqlite:///")))
    listen = ["--host", HOST, "--port", url.rpartition(":")[2], "--workers", "1"]
    # The address of the store can have a password, so it is not an argument, which other users can read.
    server = start(MLFLOW, url, "mlflow", "server", *listen, env={**env, "MLFLOW_BACKEND_STORE_URI": store})
    await_health(server, lambda: is_healthy(f"{url}/health"))


def start_worker(client: SyncPrefectClient, url: str, env: dict[str, str]) -> None:
    """Start the worker, unless one runs and answers, and register the deployments."""
    template = ProcessWorker.get_default_base_job_template()  # one flow at a time: all write the same folder
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(
            WorkPoolCreate(name=project(), type="process", base_job_template=template, concurrency_limit=1)
        )
    since = datetime.now(UTC)
    if find(WORKER) and not has_heartbeat(client, since - timedelta(seconds=SILENT_SECONDS)):
        echo(f"{WORKER:8} has sent no heartbeat for {SILENT_SECONDS:.0f} seconds; it is restarted")
        stop(WORKER)
    starting = find(WORKER) is None
    if starting:
        end_orphans(client)
    released = release_slots(client, project(), load_params().run.flow_hours)
    for line in (*released, *skip_missed(client, project())):
        echo(f"{WORKER:8} {line}")
    worker = start(WORKER, url, "flows.worker", project(), env=env)
    register(client, env)
    if starting:
        await_health(worker, lambda: has_heartbeat(client, since))


def stop(name: str) -> bool:
    """Stop a server of this checkout with its child processes; return whether it ran."""
    server = find(name)
    if process := server and server.process():
        stop_tree(process, graceful=name != WORKER)
    (FOLDER / f"{name}.json").unlink(missing_ok=True)
    return process is not None


def down() -> None:
    """Stop the processes that `up` started, with their child processes. Stored data is kept."""
    for name in (WORKER, MLFLOW, PREFECT):
        echo(f"{name:8} {'stopped' if stop(name) else 'is not running'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.servers", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    run(up if parser.parse_args().action == "up" else down)
