"""The servers behind schedules and forms: `python -m flows.servers up` and `down`, or `make up` and `make down`.

Prefect's server, MLflow's and one worker run in the background, on the loopback interface alone. `.servers/` holds
the log of each and how it is known again: a process is stopped only if its id, command and folder are those of the
one that was started here.
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
from tasks.common.paths import MLFLOW_STORE
from tasks.common.runner import run
from tasks.tracking.provenance import FLOW_RUN

FOLDER = Path(".servers")
HOST = "127.0.0.1"
POOL = "dpo"
PREFECT, MLFLOW, WORKER = "prefect", "mlflow", "worker"
WORKSPACE = "DPO_WORKSPACE"
WORKERS_RUN = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect's worker gives to the process of a flow run, and so to its stages."""
START_SECONDS, GRACE_SECONDS, POLL_SECONDS = 120.0, 15.0, 0.2
TAIL_LINES = 15
ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


@dataclass(frozen=True)
class Server:
    """One background process, as `.servers/NAME.json` remembers it."""

    name: str
    pid: int
    command: list[str]
    url: str
    """Where it listens; of the worker, the server that it asks for work."""

    def process(self) -> psutil.Process | None:
        """The process, if the one of this id still is that process."""
        try:
            process = psutil.Process(self.pid)
            same = process.cmdline()[1:] == self.command[1:] and process.cwd() == str(Path.cwd())
        except psutil.Error:
            return None
        return process if same else None


def find(name: str) -> Server | None:
    """The server of this name that runs for this folder."""
    record = FOLDER / f"{name}.json"
    server = Server(**json.loads(record.read_text())) if record.exists() else None
    return server if server and server.process() else None


def start(name: str, url: str, *words: str, env: dict[str, str]) -> Server:
    """Start `python -m WORDS`, which outlives this process; one that runs already is left as it is."""
    server = find(name)
    if server is not None:
        say(f"{name:8} runs already, {server.url}")
        return server
    command = [sys.executable, "-m", *words]
    with (FOLDER / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )
    server = Server(name, process.pid, command, url)
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(server), indent=2) + "\n")
    say(f"{name:8} starts, {url}")
    return server


def environment(prefect_url: str, mlflow_url: str) -> dict[str, str]:
    """Variables for a process that asks this Prefect server and works in this folder with this Python."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PREFECT_API_URL": f"{prefect_url}/api",
        WORKSPACE: str(Path.cwd()),
        MLFLOW_PAGES: mlflow_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for evaluations that no stage asks of it
    }


def await_health(server: Server, healthy: Callable[[], bool]) -> None:
    """Return once the server is healthy.

    Raises:
        InputError: it ended, or takes too long; with the last lines of its log.
    """
    deadline = time.monotonic() + START_SECONDS
    while not healthy():
        if server.process() is None or time.monotonic() > deadline:
            log = FOLDER / f"{server.name}.log"
            tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            raise InputError("\n".join([f"{server.name} did not start; the end of {log}:", *tail]))
        time.sleep(POLL_SECONDS)


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def address(name: str, variable: str, default: int) -> str:
    """Where a server listens or will listen.

    Raises:
        InputError: the variable holds no port, or another program listens there.
    """
    server = find(name)
    if server is not None:
        return server.url
    port = os.environ.get(variable) or str(default)
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"{variable}={port}: not a port; give a number from 1 to 65535")
    with socket.socket() as probe:
        if probe.connect_ex((HOST, int(port))) == 0:
            raise InputError(f"port {port} belongs to another program; choose another: make up {variable}=PORT")
    return f"http://{HOST}:{port}"


def make_pool(client: SyncPrefectClient) -> None:
    """The work pool, one flow run at a time because all of them write the same folder; one that is there stays."""
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=1)
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)


def end_orphans(client: SyncPrefectClient) -> None:
    """Give up runs whose worker is gone, lest they keep the pool's only slot. For a time when no worker runs.

    What such a worker left running here is ended first, so that no other run works beside it.
    """
    left = of_runs()
    flows = {process for process, is_stage in left.items() if not is_stage}
    for process in flows or left:  # a flow ends its stages
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    end(set(left))
    orphans = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )
    for orphan in orphans:
        client.set_flow_run_state(orphan.id, Crashed(message="its worker was stopped"), force=True)
        say(f"{WORKER:8} was stopped in the middle of {orphan.name}, which is marked as crashed")


def register(client: SyncPrefectClient, env: dict[str, str]) -> None:
    """Register the deployments of `prefect.yaml`, and no schedule besides; what was paused stays paused.

    Prefect's own command leaves the schedules of a deployment whose list has become empty, and resumes what a
    person has paused.

    Raises:
        InputError: Prefect refuses one; in its own words.
    """
    paused = [deployment.id for deployment in deployed(client) if deployment.paused]
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    here = {name: value for name, value in env.items() if name != WORKSPACE}  # each worker fills it in for itself
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    for identity in paused:
        client.pause_deployment(identity)
    if done.returncode:
        raise InputError(f"prefect.yaml: not registered:\n{(done.stdout + done.stderr).strip()}")
    declared = YAML(typ="safe").load(Path("prefect.yaml"))["deployments"]
    unscheduled = {entry["name"] for entry in declared if not (entry.get("schedules") or entry.get("schedule"))}
    for deployment in deployed(client):
        for extra in deployment.schedules if deployment.name in unscheduled else []:
            client.delete_deployment_schedule(deployment.id, extra.id)
            say(f"{deployment.name:8} a schedule that is not in prefect.yaml is removed")


def deployed(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """The deployments of the pool."""
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    return client.read_deployments(work_pool_filter=pool)


def heard(client: SyncPrefectClient, since: datetime) -> bool:
    """Whether the worker has reported to the server."""
    beats = [worker.last_heartbeat_time for worker in client.read_workers_for_work_pool(POOL)]
    return any(beat is not None and beat > since for beat in beats)


def up() -> None:
    """Start what does not run, wait until it is healthy, register the deployments of `prefect.yaml`.

    An MLFLOW_TRACKING_URI that is a server's is used as it is, and no MLflow is started.

    Raises:
        InputError: a port is taken, a server did not start, or a deployment is refused; what runs by then stays.
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
        words = ["mlflow", "server", "--backend-store-uri", store, *listen]
        mlflow = start(MLFLOW, mlflow_url, *words, env=env)
        await_health(mlflow, lambda: answers(f"{mlflow_url}/health"))
    await_health(prefect, lambda: answers(f"{prefect_url}/api/health"))

    with SyncPrefectClient(f"{prefect_url}/api") as client:
        make_pool(client)
        fresh, since = find(WORKER) is None, datetime.now(UTC)
        if fresh:
            end_orphans(client)
        words = ["prefect", "worker", "start", "--pool", POOL, "--name", POOL]
        worker = start(WORKER, prefect_url, *words, env=env)
        register(client, env)
        if fresh:
            await_health(worker, lambda: heard(client, since))
    say(f"\nflows, schedules, forms   {prefect_url}/deployments")
    say(f"experiments, models       {mlflow_url}")
    say(f"for commands in a shell   export PREFECT_API_URL={prefect_url}/api")


def down() -> None:
    """Stop what `up` started here, with all that it started itself, and nothing else. What was stored stays."""
    for name in (WORKER, MLFLOW, PREFECT):
        server = find(name)
        process = server and server.process()
        if process is None:
            say(f"{name:8} does not run")
        else:
            stop(process, politely=name != WORKER)
            say(f"{name:8} stopped")
        (FOLDER / f"{name}.json").unlink(missing_ok=True)


def stop(process: psutil.Process, politely: bool) -> None:
    """End a process and its descendants: its children first and politely; after a while all that is left by force.

    A worker that is told to end kills its flows, whose stages then run on, and starts the run that is next: so it
    stands still until they have ended, and is not told.
    """
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        family = {process, *process.children(recursive=True)}
        for child in process.children():
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        await_end(family, but=process)
        if politely:
            process.terminate()
            process.resume()
        else:
            process.kill()
        end(family)


def of_runs() -> dict[psutil.Process, bool]:
    """The processes of flow runs that a worker of this folder started, and whether each belongs to a stage."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if variables.get(WORKSPACE) == str(Path.cwd()) and WORKERS_RUN in variables:
                found[process] = FLOW_RUN in variables
    return found


def end(family: set[psutil.Process]) -> None:
    """Wait for processes that were told to end, then end by force what is left of them."""
    await_end(family)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=GRACE_SECONDS)


def await_end(family: set[psutil.Process], but: psutil.Process | None = None) -> None:
    """Return once all of these but one have ended, or after a while; what they start meanwhile joins them."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := {member for member in family if member != but and lives(member)}) and (
        time.monotonic() < deadline
    ):
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                family.update(member.children())
        time.sleep(POLL_SECONDS)


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; one that ended and was not waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def say(words: str) -> None:
    """Tell the user."""
    print(words, flush=True)  # noqa: T201


def main() -> None:
    """Do what the only argument says."""
    parser = argparse.ArgumentParser(prog="python -m flows.servers", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    up() if parser.parse_args().action == "up" else down()


if __name__ == "__main__":
    run(main)
