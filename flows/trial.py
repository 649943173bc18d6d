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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx
from dvc.stage.cache import _get_stage_hash
from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from dpo.common.errors import InputError, TransientError
from flows.distributed import ALIVE
from flows.git import default_remote, dvc, git, locked_repo, through_outages
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
    with heartbeat():
        return run_commit(ref, stages, get_run_logger())


def run_commit(ref: str, stages: list[str], logger: Logger) -> dict[str, str]:
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
        never = threading.Event()
        through_outages(partial(pull_inputs, stage, logger), never, logger)
        run = partial(run_stage, stage, never, logger, pull=True)
        verdicts[stage] = through_outages(run, never, logger)
        through_outages(partial(push_outputs, stage), never, logger)
    return verdicts


def pull_inputs(stage: str, logger: Logger) -> None:
    """Pull the inputs of a stage from DVC's default remote, in place of those of an earlier commit.

    `dvc repro --pull` only pulls missing inputs, so the stage would run with files that an earlier trial left.

    Raises:
        StageError: the remote lacks an input, or does not answer.
    """
    with locked_repo() as repo:
        (target,) = repo.stage.collect(stage)
        needs = [needed.addressing for needed in repo.index.graph.successors(target)]
    if needs:
        dvc("pull", "--quiet", "--force", *needs, logger=logger)


def push_outputs(stage: str) -> None:
    """Push the record of a stage's run and all outputs, also those that git tracks, to DVC's default remote.

    DVC records no run of a stage that has an output with `cache: false` which is neither metric nor plot, so this
    function does. `dvc push --run-cache` leaves such outputs out, and does not report records that did not arrive.

    Raises:
        TransientError: the remote lacks the record or an output afterwards.
    """
    with locked_repo() as repo:
        (target,) = repo.stage.collect(stage)
        repo.stage_cache.save(target)
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


@contextmanager
def heartbeat() -> Iterator[None]:
    """Renew the label `ALIVE` of this flow run until the block ends, also during a long upload."""
    run_id, ended = flow_run.id, threading.Event()

    def beat() -> None:
        with SyncPrefectClient(PREFECT_API_URL.value()) as client:
            while True:
                try:
                    client.update_flow_run_labels(run_id, {ALIVE: time.time()})
                except httpx.HTTPError as error:
                    logging.getLogger(__name__).warning("the server was not reached: %s", error)
                if ended.wait(ALIVE_SECONDS):
                    return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main() -> None:
    """Run stages of a commit in this checkout and push their outputs, without Prefect's server."""
    parser = argparse.ArgumentParser(prog="python -m flows.trial", description=main.__doc__)
    parser.add_argument("ref", help="a branch or ref of the git remote `origin`")
    parser.add_argument("stages", nargs="+", help="for example train@sigmoid-0.1-7e-05-17")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        run_commit(arguments.ref, arguments.stages, logging.getLogger("dpo"))
    except StageError as error:
        sys.exit(os.EX_TEMPFAIL if error.transient else 1)  # the output of the stage is above


if __name__ == "__main__":
    run(main)
