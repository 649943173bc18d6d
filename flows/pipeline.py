"""Bring every stage of `dvc.yaml` up to date: `python -m flows.pipeline [--parallel N]`.

DVC decides what is stale, Prefect decides when. The stages and their edges are read from DVC at every run, each
stage is one task run, and each task run is one `dvc repro --single-item`.
"""

import argparse
import codecs
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import psutil
from dvc.repo import Repo
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import PositiveInt

from flows.artifacts import BAR_SECONDS, Progress, show_stage
from flows.servers import lives
from tasks.tracking.provenance import FLOW_RUN

Logger: TypeAlias = "logging.Logger | logging.LoggerAdapter[Any]"
RAN, RESTORED, UP_TO_DATE, STOPPED, FAILED = "ran", "restored", "up to date", "stopped", "failed"
VERDICTS = {
    "Running stage '{}':": RAN,
    "Stage '{}' is cached - skipping run, checking out outputs": RESTORED,
    "Stage '{}' didn't change, skipping": UP_TO_DATE,
    "'{}' didn't change, skipping": UP_TO_DATE,  # a .dvc file
}
LEVEL = re.compile(r"\b(ERROR|WARNING)\b|^(error|warning):")
LEVELS = {"ERROR": logging.ERROR, "WARNING": logging.WARNING}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NETWORK_FAULT = re.compile(
    r"(could not|cannot) (fetch|connect)|connection (error|refused|reset|aborted)|ConnectionError|timed? ?out|"
    r"name resolution|name or service not known|network is unreachable|no route to host|"
    r"\b(429|50[0234])\b[ :,]*(client|server|too many|internal|bad gateway|service|gateway)",
    re.IGNORECASE,
)
RETRY_SECONDS = [30.0, 300.0]
POLL_SECONDS = 0.5
STOP_SECONDS = 20.0
TAIL_LINES = 15


class StageError(Exception):
    """A stage failed; the message names it and ends with the last lines of its output."""


def read_graph() -> dict[str, list[str]]:
    """What `dvc repro` would visit in this folder: each stage, by DVC's name for it, with the stages it needs.

    Raises DVC's own errors when there is no DVC project here or when `dvc.yaml` is invalid.
    """
    with Repo() as repo:
        graph = repo.index.graph
        stages = repo.stage.collect("dvc.yaml")
        for stage in stages:  # grows on the way by what is needed from outside this dvc.yaml
            stages += [needed for needed in graph.successors(stage) if needed not in stages]
        return {stage.addressing: [needed.addressing for needed in graph.successors(stage)] for stage in stages}


def read_output(process: subprocess.Popen[bytes], stop: threading.Event) -> Iterator[str]:
    """Text as it comes, "" when none came for a moment; ends with the process, or once `stop` is set."""
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while not stop.is_set():
        if select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                return
            yield decoder.decode(data)
        elif process.poll() is not None:  # gone, though a child of it still holds the pipe
            return
        else:
            yield ""


def split_lines(chunks: Iterable[str], bar_seconds: float = BAR_SECONDS) -> Iterator[str]:
    """Whole lines without terminal escapes; of a progress bar its last state, and one more every `bar_seconds`."""
    rest, shown, last_bar = "", time.monotonic(), ""
    for chunk in chunks:
        *ended, rest = (rest + chunk).split("\n")
        yield from (visible(line) for line in ended)
        if "\r" in rest:
            bar = visible(rest)
            rest = "\r".join(rest.split("\r")[-2:])
            if bar != last_bar and time.monotonic() - shown >= bar_seconds:
                yield bar
                shown, last_bar = time.monotonic(), bar
    if rest:
        yield visible(rest)


def visible(line: str) -> str:
    """What a terminal would show of a line that carriage returns overwrite."""
    states = [state.rstrip() for state in ESCAPE.sub("", line).split("\r")]
    return next((state for state in reversed(states) if state), "")


def execute(
    command: list[str], stop: threading.Event, logger: Logger, see: Callable[[str], None] | None = None
) -> tuple[int, list[str]]:
    """Run a Python module of this environment, `python -m COMMAND`; log its output line by line.

    Nothing that it started outlives this call, however it ends.

    Args:
        command: the module and its arguments.
        stop: ends it when set.
        logger: gets the lines, each at the level that it names.
        see: is given each line, too.

    Returns:
        Its exit code, not 0 if `stop` ended it, and its lines.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            **({FLOW_RUN: flow_run.id} if flow_run.id else {}),
        },
        start_new_session=True,
    )
    lines = []
    try:
        for line in filter(None, split_lines(read_output(process, stop))):
            found = LEVEL.search(line)
            logger.log(LEVELS[found[0].rstrip(":").upper()] if found else logging.INFO, line)
            lines.append(line)
            if see:
                see(line)
        if not stop.is_set():
            process.wait()
    finally:
        end_group(process, STOP_SECONDS if process.poll() is None else 0.0)
    return process.returncode, lines


def end_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End a process and all that it started: a training has some seconds to keep what it has done."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + seconds
        while time.monotonic() < until and _lives(process.pid):
            time.sleep(POLL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lives(group: int) -> bool:
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and lives(process):
                return True
    return False


def run_stage(stage: str, stop: threading.Event, logger: Logger, see: Callable[[str], None] | None = None) -> str:
    """Bring one stage up to date through DVC; return what DVC did. Raises StageError if DVC fails."""
    code, lines = execute(["dvc", "--wait-for-lock", "repro", "--single-item", stage], stop, logger, see)
    if code and stop.is_set():
        return STOPPED
    if code:
        raise StageError("\n".join([f"{stage} failed; its last output:", *lines[-TAIL_LINES:]]))
    verdicts = {line.format(stage): verdict for line, verdict in VERDICTS.items()}
    return next((verdicts[line] for line in lines if line in verdicts), RAN)  # DVC speaks first


def may_pass(task: object, run: object, state: State[Any]) -> bool:
    """Whether a task failed for a fault of the network, which may be gone soon: Prefect then tries it again.

    Where the output names the user's error, only that decides: bad data that speaks of a network stays bad.
    """
    fault = state.result(raise_on_failure=False)
    lines = str(fault).splitlines() if isinstance(fault, StageError) else []
    errors = [line for line in lines if line.startswith("error: ")]
    return any(NETWORK_FAULT.search(line) for line in errors or lines)


def name_flow_run() -> str:
    """Which project, and when."""
    return f"{Path.cwd().name} {datetime.now():%Y-%m-%d %H:%M:%S}"


PATIENT: dict[str, Any] = {
    "retries": len(RETRY_SECONDS),
    "retry_delay_seconds": RETRY_SECONDS,
    "retry_condition_fn": may_pass,
}
"""Of a task that is tried again when its fault may pass by itself."""


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, **PATIENT)
def bring_up_to_date(stage: str, stop: threading.Event) -> str | State[str]:
    """One stage as one task run, whose state tells what DVC did. Raises StageError if the stage fails.

    A fault that can pass is tried again, twice; a stage that failed for bad data or settings is not.
    """
    progress, start, verdict = Progress(stage), time.monotonic(), FAILED
    try:
        verdict = run_stage(stage, stop, get_run_logger(), progress.show)
    finally:
        progress.end(verdict, complete=verdict not in (FAILED, STOPPED))
        if verdict not in (UP_TO_DATE, STOPPED):
            show_stage(stage, verdict, time.monotonic() - start, complete=verdict != FAILED)
    if verdict == UP_TO_DATE:
        return Completed(name="UpToDate", message="nothing changed", data=verdict)
    if verdict == RESTORED:
        return Completed(name="Restored", message="outputs taken from DVC's run cache", data=verdict)
    if verdict == STOPPED:
        return Cancelled(message="the flow stopped")
    return verdict


@flow(name="pipeline", flow_run_name=name_flow_run)
def pipeline(parallel: PositiveInt = 1) -> dict[str, str]:
    """Bring all stages up to date, one generation of the graph after the other, `parallel` stages at once.

    Returns what DVC did with each stage. Raises StageError if one failed; what needs a failed stage is not run,
    all else is.
    """
    graph = read_graph()
    generations = TopologicalSorter(graph)
    generations.prepare()
    futures: dict[str, PrefectFuture[Any]] = {}
    stop = threading.Event()
    with ThreadPoolTaskRunner[Any](max_workers=parallel) as runner:
        try:
            while generations.is_active():
                generation = generations.get_ready()
                for stage in generation:
                    upstream = [futures[needed] for needed in graph[stage]]
                    futures[stage] = runner.submit(
                        bring_up_to_date, {"stage": stage, "stop": stop}, wait_for=upstream
                    )
                for stage in generation:
                    futures[stage].wait()
                generations.done(*generation)
        finally:
            stop.set()  # a flow that is interrupted here takes its stages with it

    states = {stage: future.state for stage, future in futures.items()}
    for name in dict.fromkeys(state.name for state in states.values()):
        ended = [stage for stage, state in states.items() if state.name == name]
        get_run_logger().info("%s: %s", name, ", ".join(ended))
    failures = [str(state.message) for state in states.values() if state.is_failed()]
    if failures:
        not_run = [stage for stage, state in states.items() if state.is_pending()]
        raise StageError("\n".join([*failures, f"not run: {', '.join(not_run) or 'none'}"]))
    return {stage: future.result() for stage, future in futures.items()}


def run_now(work: Callable[..., Any], **parameters: object) -> State[Any]:
    """Run a flow in this process; the state that it ends in. Exits with one error if Prefect's server is gone.

    Stages run on without the server, so that DVC has what they make; only their flow run cannot be ended then.
    """
    try:
        state: State[Any] = work(**parameters, return_state=True)
    except httpx.TransportError as error:
        words = (
            f"error: Prefect's server at {PREFECT_API_URL.value()} is gone ({error}): this run has no end there. "
            "The stages that are done are named above, and DVC keeps what they made: start the server (`make up`) "
            "and run this again, it goes on from there\n"
        )
        sys.stderr.write(words)
        sys.stderr.flush()
        os._exit(1)  # else Prefect tries at exit, for minutes, to send what it would tell the server
    return state


def main() -> int:
    """Run the flow now, on the server of PREFECT_API_URL or else on one of its own; exit code 1 on failure."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=main.__doc__)
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="stages that run at once (default: 1)"
    )
    return 0 if run_now(pipeline, **vars(parser.parse_args())).is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
