"""Bring every stage of `dvc.yaml` up to date: `python -m flows.pipeline [--parallel N]`.

DVC decides which stages are stale, Prefect decides when they run. The flow reads stages, dependencies and changes
from DVC at every run. Each stage is one task run. If the stage changed, or if a stage that it needs was not up to
date, the task run starts one `dvc repro --single-item`.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeAlias

import httpx
from dvc.lock import LockError
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import PositiveInt

from dpo.common.errors import TransientError
from dpo.common.progress import PROGRESS_FILE
from flows.artifacts import ProgressArtifact, failure_page, publish_stage
from flows.distributed import machines_of_trials
from flows.git import lacks_outputs, locked_repo, restore_outputs, through_outages
from flows.processes import Logger, StageError, command_error, execute
from tasks.common.addresses import shown

POLL_SECONDS = 5.0
"""Time between two attempts to read stages while another DVC command runs."""
log = get_logger("pipeline")

RAN, RESTORED, UP_TO_DATE, STOPPED, FAILED = "ran", "restored", "up to date", "stopped", "failed"
VERDICTS = {
    "Running stage '{}':": RAN,
    "Stage '{}' is cached - skipping run, checking out outputs": RESTORED,
    "Stage '{}' didn't change, skipping": UP_TO_DATE,
    "'{}' didn't change, skipping": UP_TO_DATE,  # a .dvc file
}
"""What DVC did with a stage, by the line that DVC prints."""
PULLED = "Pulling data for stage: '{}'"
"""DVC's only line if it fetched outputs from the remote. Another line follows if the remote lacks them."""
TRANSIENT = re.compile(rf"ERROR: failed to reproduce '.*': failed to run: .*, exited with {os.EX_TEMPFAIL}")
"""DVC's line for a stage that ended with EX_TEMPFAIL. DVC's own exit code is the same for every failure."""


def read_graph() -> tuple[dict[str, list[str]], set[str]]:
    """Return the stages that `dvc repro` visits, by DVC's name with the stages that each needs, and which changed.

    Waits while another DVC command of this checkout runs a stage. Raises DVC's own errors if this is not a DVC
    project or `dvc.yaml` is invalid.
    """
    waits = False
    while True:
        try:
            return _read_graph()
        except LockError as error:  # DVC's option to wait is for the lock of the repository, not for paths
            if not waits:
                log.warning("waiting for another DVC command: %s", str(error).partition("\n\n")[0])
            waits = True
        time.sleep(POLL_SECONDS)


def _read_graph() -> tuple[dict[str, list[str]], set[str]]:
    with locked_repo() as repo:
        graph = repo.index.graph
        stages = repo.stage.collect("dvc.yaml")
        for stage in stages:  # the loop appends needed stages from outside this dvc.yaml
            stages += [needed for needed in graph.successors(stage) if needed not in stages]
        needs = {stage.addressing: [needed.addressing for needed in graph.successors(stage)] for stage in stages}
        return needs, {stage.addressing for stage in stages if stage.changed()}


def run_stage(stage: str, stop: threading.Event, logger: Logger, pull: bool = False, **options: Any) -> str:
    """Bring one stage up to date and return what DVC did, or raise StageError. Takes the options of `execute`.

    `pull` fetches missing inputs, and results of the same run on another machine, from DVC's default remote.
    """
    if pull and lacks_outputs(stage):
        if restore_outputs(stage):
            return RESTORED
        pull = False  # with it, DVC would not notice that the outputs are missing
    command = ["dvc", "--wait-for-lock", "repro", *(["--pull"] if pull else []), "--single-item", stage]
    code, lines = execute(command, stop, logger, **options)
    if code and stop.is_set():
        return STOPPED
    if code:
        raise command_error(stage, lines, transient=any(TRANSIENT.fullmatch(line) for line in lines))
    verdicts = {line.format(stage): verdict for line, verdict in VERDICTS.items()}
    otherwise = RESTORED if PULLED.format(stage) in lines else RAN
    return next((verdicts[line] for line in lines if line in verdicts), otherwise)  # DVC's line is the first


def is_transient(task: object, run: object, state: State[Any]) -> bool:
    """Return whether a task failed with an error that may disappear; Prefect then retries the task."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError) or (isinstance(error, StageError) and error.transient)


Elsewhere: TypeAlias = Callable[[str, threading.Event, Logger], None]
MOST_TRIALS = 64  # threads, each of which waits for a stage on another machine
RETRIES: Any = {"retries": 2, "retry_delay_seconds": [30.0, 300.0], "retry_condition_fn": is_transient}


def name_flow_run() -> str:
    """Return the project's name and the time."""
    return f"{Path.cwd().name} {datetime.now():%Y-%m-%d %H:%M:%S}"


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, **RETRIES)
def bring_up_to_date(
    stage: str, stop: threading.Event, stale: bool, slots: threading.Semaphore, elsewhere: Elsewhere | None = None
) -> str | State[str]:
    """Run one stage, if it is stale, as a task run whose state says what DVC did. Raise StageError if it fails.

    If `elsewhere` is given, it runs the stage on another machine first, and DVC then restores the results. `slots`
    limits the stages that run in this checkout.
    """
    if not stale:
        get_run_logger().info("Stage '%s' didn't change, skipping", stage)
        return Completed(name="UpToDate", message="nothing changed", data=UP_TO_DATE)
    start, verdict = time.monotonic(), FAILED
    with TemporaryDirectory(prefix="dpo-progress-") as folder:
        progress = ProgressArtifact(stage, Path(folder) / "progress.json")
        try:
            env = {PROGRESS_FILE: str(progress.file)}
            logger = get_run_logger()
            if elsewhere is not None:
                elsewhere(stage, stop, logger)
            with slots:
                pull = elsewhere is not None
                work = partial(run_stage, stage, stop, logger, pull=pull, env=env, poll=progress.update)
                verdict = through_outages(work, stop, logger) if pull else work()
        finally:
            progress.end(verdict, complete=verdict not in (FAILED, STOPPED))
            if verdict not in (UP_TO_DATE, STOPPED):
                publish_stage(stage, verdict, time.monotonic() - start, complete=verdict != FAILED)
    if verdict == UP_TO_DATE:
        return Completed(name="UpToDate", message="nothing changed", data=verdict)
    if verdict == RESTORED:
        return Completed(name="Restored", message="outputs restored from DVC's cache or remote", data=verdict)
    if verdict == STOPPED:
        return Cancelled(message="the flow was stopped")
    return verdict


@flow(name="pipeline", flow_run_name=name_flow_run)
def pipeline(parallel: PositiveInt = 1, distributed: bool = False) -> dict[str, str]:
    """Bring all stages up to date in the order of the graph, up to `parallel` stages at once.

    If `distributed`, the stages of trials run on machines that have a worker for the pool of trials, all at once.

    Returns what DVC did with each stage. Raises StageError if a stage failed; stages that need it do not run, all
    others do. Raises InputError if trials cannot be distributed.
    """
    with failure_page("Pipeline"):
        return run_stages(parallel, distributed)


def run_stages(parallel: int, distributed: bool) -> dict[str, str]:
    """Bring all stages up to date; see `pipeline`."""
    graph, changed = read_graph()
    machines = machines_of_trials() if distributed else None
    slots, most = threading.Semaphore(parallel), max(parallel, MOST_TRIALS) if distributed else parallel
    generations = TopologicalSorter(graph)
    generations.prepare()
    futures: dict[str, PrefectFuture[Any]] = {}
    stop = threading.Event()
    with ThreadPoolTaskRunner[Any](max_workers=most) as runner:
        try:
            while generations.is_active():
                generation = generations.get_ready()
                for stage in generation:
                    upstream = [futures[needed] for needed in graph[stage]]
                    stale = stage in changed or any(future.state.name != "UpToDate" for future in upstream)
                    elsewhere = partial(machines.run, graph[stage]) if machines and "@" in stage else None
                    parameters = {"stage": stage, "stop": stop, "stale": stale, "slots": slots}
                    parameters["elsewhere"] = elsewhere
                    futures[stage] = runner.submit(bring_up_to_date, parameters, wait_for=upstream)
                wait([futures[stage] for stage in generation])
                generations.done(*generation)
        finally:
            stop.set()  # if the flow is interrupted, its stages stop too

    states = {stage: future.state for stage, future in futures.items()}
    for name in dict.fromkeys(state.name for state in states.values()):
        stages = [stage for stage, state in states.items() if state.name == name]
        get_run_logger().info("%s: %s", name, ", ".join(stages))
    if failures := [str(state.message) for state in states.values() if state.is_failed()]:
        not_run = ", ".join(stage for stage, state in states.items() if state.is_pending()) or "none"
        failures = [f"{len(failures)} of {len(states)} stages failed:", *failures, f"not run: {not_run}"]
        raise StageError("\n".join(failures))
    return {stage: future.result() for stage, future in futures.items()}


def check_server() -> None:
    """Exit with 1 if the server of PREFECT_API_URL does not answer."""
    url = PREFECT_API_URL.value()
    for _ in range(3 if url else 0):
        with suppress(httpx.HTTPError):
            httpx.get(f"{url}/health", timeout=10).raise_for_status()
            return
        time.sleep(1)
    if url:
        sys.exit(
            f"error: PREFECT_API_URL: Prefect's server at {shown(url)} does not answer; start it with `make up`, "
            "or run without it: `unset PREFECT_API_URL`"
        )


def run_now(work: Callable[..., Any], **parameters: object) -> NoReturn:
    """Run a flow in this process. Exit with 0 if it completes or another run is active, else with 1.

    SIGTERM ends it with 143, as any other command.

    If Prefect's server is lost, stages continue, so DVC has their outputs; only the flow run cannot be finished.
    """
    check_server()
    try:
        state = work(**parameters, return_state=True)
    except httpx.TransportError as error:
        sys.stderr.write(
            f"error: Prefect's server at {shown(PREFECT_API_URL.value() or '')} cannot be reached ({error}), so "
            "this flow run is not marked as finished there. DVC has the outputs of the completed stages listed "
            "above. Start the server (`make up`) and run this command again: it runs only what is missing\n"
        )
        sys.stderr.flush()
        os._exit(1)  # a normal exit waits minutes for Prefect to send its last messages
    if state.is_completed() or state.name == "AlreadyRunning":
        sys.exit(0)
    sys.exit(128 + signal.SIGTERM if state.is_cancelled() else 1)


def main() -> None:
    """Run the flow on the server of PREFECT_API_URL, else on a temporary one. Exit with 1 if a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=main.__doc__)
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="stages to run at once (default: 1)")
    parser.add_argument("--distributed", action="store_true", help="run trials on machines with a worker for them")
    run_now(pipeline, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
