"""Run the trials of a sweep on machines that have a worker for the pool of trials, see `flows/trial.py`."""

import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Crashed

from dpo.common.errors import InputError
from flows.git import default_remote, dvc, git, locked_repo, snapshot_commit, through_outages
from flows.identity import project
from flows.processes import Logger
from tasks.common.addresses import shown

ALIVE = "dpo.alive"
"""Label of a flow run, renewed while it works."""
POLL_SECONDS = 2.0
LOST_SECONDS = 90.0  # without a renewed label
PENDING_SECONDS = 600.0  # until a machine has started the run that its worker took
ATTEMPTS = 2
SET_FOLDER = "prefect.deployments.steps.set_working_directory"


@dataclass(frozen=True)
class Machines:
    """Where trials run."""

    pool: str
    deployment: str
    ref: str
    """Prefix of the refs of this run in the git remote `origin`."""
    tracking_uri: str

    def check(self, client: SyncPrefectClient) -> None:
        """Raise InputError if trials cannot run elsewhere: no DVC remote, git remote, MLflow server or worker."""
        if default_remote() is None:
            raise InputError("dvc: no default remote, which trials need: `dvc remote add --default NAME URL`")
        if "origin" not in git("remote").splitlines():
            raise InputError("git: no remote `origin`, from which other machines fetch the code; add one")
        if not self.tracking_uri.startswith(("http://", "https://")):
            raise InputError(
                "MLFLOW_TRACKING_URI: not the address of a server, so trials on other machines could not log to "
                "it; set it, for example to that of `make up`"
            )
        if not self.has_worker(client):
            raise InputError(
                f"pool {self.pool}: no worker is online; start one in a clone on each machine: "
                f"`DPO_WORKSPACE=$PWD prefect worker start --pool {self.pool} --type process --limit 1`"
            )

    def has_worker(self, client: SyncPrefectClient) -> bool:
        """Return whether a worker of the pool is online."""
        try:
            workers = client.read_workers_for_work_pool(self.pool)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.NOT_FOUND:
                raise
            return False
        return any(worker.status == WorkerStatus.ONLINE for worker in workers)

    def run(self, needs: list[str], stage: str, stop: threading.Event, logger: Logger) -> None:
        """Run a stage on a machine and wait. If that fails twice, say so: the stage then runs in this checkout."""
        ref = f"{self.ref}/{stage.replace('@', '/')}"
        through_outages(partial(push_snapshot, ref, needs), stop, logger)
        try:
            with SyncPrefectClient(PREFECT_API_URL.value()) as client:
                for _ in range(ATTEMPTS):
                    if stop.is_set() or not self.has_worker(client):
                        break
                    started: Any = run_deployment(
                        self.deployment,
                        parameters={"ref": ref, "stages": [stage]},
                        timeout=0,
                        flow_run_name=stage,
                        job_variables={"env": {"MLFLOW_TRACKING_URI": shown(self.tracking_uri)}},
                    )
                    ended = self._wait(client, started, stop)
                    if ended.state and ended.state.is_completed():
                        return
                    logger.warning("%s: %s: %s", stage, ended.state_name, ended.state and ended.state.message)
        finally:
            git("push", "--quiet", "origin", "--delete", ref)
        logger.warning("%s: no machine completed it; it runs in this checkout", stage)

    def _wait(self, client: SyncPrefectClient, started: FlowRun, stop: threading.Event) -> FlowRun:
        """Wait until a run ends. Mark it as crashed if its machine gives no sign of life, cancel it on `stop`."""
        seen, since = None, time.monotonic()
        while True:
            run = client.read_flow_run(started.id)
            if run.state is None or run.state.is_final():
                return run
            now = (run.state_name, run.labels.get(ALIVE))
            if now != seen or (run.state.is_scheduled() and self.has_worker(client)):
                seen, since = now, time.monotonic()
            limit = LOST_SECONDS if run.state.is_running() or run.state.is_scheduled() else PENDING_SECONDS
            if stop.is_set():
                client.set_flow_run_state(run.id, Cancelling(), force=True)
                return run
            if time.monotonic() - since > limit:
                silent = f"no sign of life from the machine for {limit:.0f} seconds"
                client.set_flow_run_state(run.id, Crashed(message=silent), force=True)
            stop.wait(POLL_SECONDS)


def machines_of_trials() -> Machines:
    """Return the machines for the trials of this flow run. Raise InputError if trials cannot run there."""
    name, uri = project(), os.environ.get("MLFLOW_TRACKING_URI", "")
    machines = Machines(f"{name}-trials", f"trial/{name}", f"refs/dpo/{flow_run.id}", uri)
    with SyncPrefectClient(PREFECT_API_URL.value()) as client:
        machines.check(client)
        client.create_deployment(
            flow_id=client.create_flow_from_name("trial"),
            name=name,
            work_pool_name=machines.pool,
            entrypoint="flows/trial.py:trial",
            pull_steps=[{SET_FOLDER: {"directory": "{{ $DPO_WORKSPACE }}"}}],
            enforce_parameter_schema=False,
        )
    return machines


def push_snapshot(ref: str, needs: list[str]) -> None:
    """Push the tracked files as they are now to `ref` of the git remote, on no branch, and the outputs of `needs`.

    The commit also has the outputs that DVC leaves to git, such as the cost of a training, which evaluation reads.

    Raises:
        InputError: a file that the stages of trials read is neither in git nor in DVC.
    """
    with locked_repo() as repo:
        trials = [stage for stage in repo.index.stages if "@" in stage.addressing]  # others run in this checkout
        used = {dep.fs_path for stage in trials for dep in stage.deps}
        outputs = [out.fs_path for stage in repo.index.stages for out in stage.outs if not out.use_cache]
        for name in git("ls-files", "--others", "--exclude-standard").splitlines():
            path = repo.fs.abspath(name)
            if path not in outputs and any(path == each or path.startswith(f"{each}/") for each in used):
                raise InputError(
                    f"{name}: neither git nor DVC has this file, so another machine does not have it; run "
                    f"`dvc add {name}` for data and models, `git add {name}` for code"
                )
        commit = snapshot_commit("dvc.lock", *outputs)
    dvc("push", "--quiet", "--with-deps", *needs)
    git("push", "--quiet", "--force", "origin", f"{commit}:{ref}")
