"""Run stages of a commit in the checkout of this machine: `python -m flows.trial REF STAGE...`.

`python -m flows.pipeline --distributed` starts such a run for each trial of a sweep, on a machine that has a
worker for the pool of trials. DVC's remote has the inputs and collects the outputs. The checkout that started the
sweep restores them, so there is one DAG and one `dvc.lock`. Under Slurm and SkyPilot the command is the same.
"""

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import httpx
from dvc.repo import Repo
from dvc.stage.cache import _get_stage_hash
from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from dpo.common.errors import InputError, TransientError
from flows.distributed import ALIVE
from flows.git import default_remote, git
from flows.pipeline import run_stage
from flows.processes import Logger, StageError
from tasks.common.git import inputs_changed
from tasks.common.runner import run

ALIVE_SECONDS = 15.0


@flow(name="trial")
def trial(ref: str, stages: list[str]) -> dict[str, str]:
    """Run stages of a commit in this checkout and push their outputs.

    Returns what DVC did with each stage. Raises StageError if a stage fails, or if DVC's remote lacks an output
    afterwards.

    Args:
        ref: name of the commit in the git remote `origin`.
        stages: names of the stages, in order.
    """
    return run_commit(ref, stages, get_run_logger(), _heartbeat())


def run_commit(ref: str, stages: list[str], logger: Logger, poll: Callable[[], None]) -> dict[str, str]:
    """Check out a commit, run stages with inputs from DVC's remote, and push their outputs; see `trial`.

    Raises:
        InputError: this checkout has changes of its own, or no remote.
    """
    if default_remote() is None:
        raise InputError("dvc: this checkout has no default remote; add one: `dvc remote add --default NAME URL`")
    if inputs_changed():
        raise InputError("git: tracked files have changes, which the commit of a trial would replace; commit them")
    git("fetch", "--quiet", "origin", ref)
    git("checkout", "--quiet", "--force", "--detach", "FETCH_HEAD")
    verdicts = {}
    for stage in stages:
        verdicts[stage] = run_stage(stage, threading.Event(), logger, pull=True, poll=poll)
        push_outputs(stage)
    return verdicts


def push_outputs(stage: str) -> None:
    """Push the record of a stage's run and all outputs, also those that git tracks, to DVC's default remote.

    `dvc push --run-cache` leaves out outputs with `cache: false`, without which DVC restores no run, and does not
    report records that failed to arrive.

    Raises:
        TransientError: the remote lacks the record or an output afterwards.
    """
    with Repo(_wait_for_lock=True) as repo, repo.lock:
        (target,) = repo.stage.collect(stage)
        key = _get_stage_hash(target)
        runs = [found for found in repo.stage_cache.push(None) if found[0] == key]
        records = repo.cloud.get_remote_odb(None, "push", hash_name="md5-dos2unix")
        paths = [records.fs.join(records.path, "runs", key[:2], key, value) for _, value in runs]
        missing = [path for path in paths if not records.fs.exists(path)] if paths else ["the record of its run"]
        for objects in repo.stage_cache.get_used_objs(runs).values():
            repo.cloud.push(objects)
            missing += [found.value for found in repo.cloud.status(objects).new]
    if missing:
        raise TransientError(
            f"{stage}: DVC's remote lacks {len(missing)} of its outputs: {', '.join(missing[:5])}"
        )


def _heartbeat() -> Callable[[], None]:
    """Return a function that renews the label of this flow run, if the last time is long enough ago."""
    last = 0.0
    client = SyncPrefectClient(PREFECT_API_URL.value())

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last < ALIVE_SECONDS:
            return
        last = time.monotonic()
        try:
            client.update_flow_run_labels(flow_run.id, {ALIVE: time.time()})
        except httpx.HTTPError as error:
            logging.getLogger(__name__).warning("the server was not reached: %s", error)

    return beat


def main() -> None:
    """Run stages of a commit in this checkout and push their outputs, without Prefect's server."""
    parser = argparse.ArgumentParser(prog="python -m flows.trial", description=main.__doc__)
    parser.add_argument("ref", help="a branch or ref of the git remote `origin`")
    parser.add_argument("stages", nargs="+", help="for example train@sigmoid-0.1-7e-05-17")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        run_commit(arguments.ref, arguments.stages, logging.getLogger("dpo"), lambda: None)
    except StageError as error:
        sys.exit(os.EX_TEMPFAIL if error.transient else 1)  # the output of the stage is above


if __name__ == "__main__":
    run(main)
