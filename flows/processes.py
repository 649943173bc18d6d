"""Run commands as child processes, log their output, and stop processes together with their children."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from prefect import get_run_logger
from prefect.runtime import flow_run

from tasks.common.addresses import without_credentials
from tasks.tracking.provenance import FLOW_RUN

Logger: TypeAlias = "logging.Logger | logging.LoggerAdapter[Any]"
LEVEL = re.compile(r"\b(ERROR|WARNING)\b|^(error|warning):")
ADVICE = re.compile(
    r"(To track the changes with git, run:|To enable auto staging, run:|\s*git add |\s*dvc config core\.autostage"
    r"|Use `dvc push` to send your updates|Having any troubles\?|hint: )"
)
"""DVC's advice about commands that the flows run themselves."""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ECHO = re.compile(r"(ERROR: failed to reproduce '.*': )failed to run: .*(exited with -?\d+)")
"""DVC's echo of a command, which would hide the error above it."""
FLOW_PROCESS = "DPO_FLOW_PROCESS"
"""Environment variable with the process id of the flow that started a process."""
POLL_SECONDS = 0.5
STOP_SECONDS = 20.0  # for a stopped command to write a checkpoint before it is killed
GRACE_SECONDS = 15.0  # for a server, worker or flow to exit before it is killed
TAIL_LINES = 15


class StageError(Exception):
    """A command failed. The message names the command and ends with the last lines of its output."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient  # a retry may succeed without a change, for example after a network fault


def command_error(title: str, lines: list[str], transient: bool = False) -> StageError:
    """Return the error of a failed command, with DVC's own errors and the last lines of the output."""
    lines = [ECHO.sub(r"\1\2", line) for line in lines if not line.startswith("> ")]
    errors = [line for line in lines[:-TAIL_LINES] if line.startswith(("ERROR", "error:"))]  # before many files
    return StageError("\n".join([f"{title} failed; its last output:", *errors, *lines[-TAIL_LINES:]]), transient)


def search_path() -> str:
    """Return the PATH of child processes, on which the programs of this Python come first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def run_module(*command: str, logger: "Logger | None" = None) -> list[str]:
    """Run `python -m COMMAND`, log its output, by default to the flow run, and return the lines.

    Raises StageError if it fails.
    """
    code, lines = execute(command, threading.Event(), logger or get_run_logger())
    if code:
        raise command_error(" ".join(command), lines, transient=code == os.EX_TEMPFAIL)
    return lines


def execute(
    command: Sequence[str],
    stop: threading.Event,
    logger: Logger,
    env: Mapping[str, str] | None = None,
    poll: Callable[[], None] = lambda: None,
) -> tuple[int, list[str]]:
    """Run `python -m COMMAND`, log each line at the level that the line names, and return exit code and lines.

    `stop` ends the command; the exit code is then not 0. `env` has variables to add. `poll` is called at least
    every `POLL_SECONDS`. When this function returns or raises, no process that the command started is left.
    """
    added = {"PATH": search_path(), "PYTHONUNBUFFERED": "1", FLOW_PROCESS: str(os.getpid())}
    added |= {FLOW_RUN: flow_run.id} if flow_run.id else {}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **added, **(env or {})},
        start_new_session=True,
    )
    lines = []
    try:
        for line in filter(None, split_lines(_read(process, stop, poll))):
            if ADVICE.match(line):
                continue
            line = without_credentials(line)
            found = LEVEL.search(line)
            logger.log(logging.getLevelNamesMapping()[found[0].rstrip(":").upper() if found else "INFO"], line)
            lines.append(line)
        if not stop.is_set():
            process.wait()
    finally:
        end_group(process, STOP_SECONDS if process.poll() is None else 0.0)
    return process.returncode, lines


def _read(process: subprocess.Popen[bytes], stop: threading.Event, poll: Callable[[], None]) -> Iterator[str]:
    """Yield output as it arrives, "" after `POLL_SECONDS` without any, until the process ends or `stop` is set."""
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while not stop.is_set():
        poll()
        if select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            if not (data := os.read(process.stdout.fileno(), 65536)):
                return
            yield decoder.decode(data)
        elif process.poll() is None:
            yield ""
        else:  # ended, but a child still holds the pipe
            return


def split_lines(chunks: Iterable[str], bar_seconds: float = 10.0) -> Iterator[str]:
    """Yield complete lines without escapes; of a progress bar one state per `bar_seconds` and the last."""
    rest, shown, last_bar = "", time.monotonic(), ""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split("\n")
        yield from (visible(line) for line in complete)
        if "\r" in rest:
            bar = visible(rest)
            rest = "\r".join(rest.split("\r")[-2:])
            if bar != last_bar and time.monotonic() - shown >= bar_seconds:
                yield bar
                shown, last_bar = time.monotonic(), bar
    if rest:
        yield visible(rest)


def visible(line: str) -> str:
    """Return what a terminal shows of a line that carriage returns overwrite."""
    states = [state.rstrip() for state in ESCAPE.sub("", line).split("\r")]
    return next(filter(None, reversed(states)), "")


def end_group(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Send SIGTERM to the process group of `process`, and SIGKILL to what still runs after some seconds."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _is_group_running(process.pid):
            time.sleep(POLL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_group_running(group: int) -> bool:
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and is_running(process):
                return True
    return False


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def stop_tree(process: psutil.Process, graceful: bool) -> None:
    """Stop a process and its descendants: SIGTERM for its children first, SIGKILL for what is left.

    A Prefect worker that receives SIGTERM kills its flows, whose stages then continue, and starts the next run.
    So the process is suspended until its children have ended; if not `graceful`, it is then killed.
    """
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        family = {process, *process.children(recursive=True)}
        send_signal(signal.SIGTERM, process.children())
        wait_for_exit(family, ignore=process)
        send_signal(signal.SIGTERM if graceful else signal.SIGKILL, [process])
        send_signal(signal.SIGCONT, [process])
        kill_after_grace(family)


def send_signal(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    """Send a signal to processes that may have ended already."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def kill_after_grace(family: set[psutil.Process]) -> None:
    """Wait up to `GRACE_SECONDS` for processes that received SIGTERM, then kill those that still run."""
    wait_for_exit(family)
    send_signal(signal.SIGKILL, family)
    psutil.wait_procs(family, timeout=GRACE_SECONDS)


def wait_for_exit(family: set[psutil.Process], ignore: psutil.Process | None = None) -> None:
    """Wait up to `GRACE_SECONDS` until all processes but `ignore` have ended; add the children they start."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and (running := {each for each in family - {ignore} if is_running(each)}):
        for process in running:
            with suppress(psutil.NoSuchProcess):
                family.update(process.children())
        time.sleep(POLL_SECONDS)
