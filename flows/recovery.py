"""Run one retraining or rollback at a time, and recover from one that failed or was killed."""

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled

from flows.git import commit, fetch_missing_data, git, remove_dead_locks, restore_files
from flows.journal import WORK, Journal, close, restore, unfinished
from flows.landing import refuse
from flows.processes import FLOW_PROCESS, StageError, kill_after_grace, send_signal
from tasks.report.promotion import describe
from tasks.tracking.champions import RUN
from tasks.tracking.offline import connect
from tasks.tracking.registry import COMMIT, LANDED, VERSIONED, champion, roll_back, version
from tasks.tracking.sweeps import name_sweeps, record_decision

LOCK = WORK / "lock"


def run_exclusively(work: Callable[[Journal | None], State[Any]]) -> State[Any]:
    """Run `work`, or return AlreadyRunning if another retraining or rollback of this checkout runs.

    Before it, stop what dead flows left, and recover from their run. `work` gets the journal of a run that was
    completed: a rollback, or a retraining that may have to push. SIGTERM ends in the state Cancelled.
    """
    LOCK.parent.mkdir(exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            end_orphaned_stages()
            remove_dead_locks()
            return work(recover(unfinished()))
    except Timeout:
        message = f"another retraining or rollback holds {LOCK}; this run did nothing"
        get_run_logger().warning(message)
        return Cancelled(name="AlreadyRunning", message=message)
    except TerminationSignal:
        return Cancelled(message="stopped by SIGTERM; the next run continues")


def end_orphaned_stages() -> None:
    """Stop the processes that a killed flow of this checkout started."""
    orphans = set()
    for process in psutil.process_iter(["environ"]):
        parent = (process.info["environ"] or {}).get(FLOW_PROCESS)
        with suppress(psutil.Error):
            if parent and not psutil.pid_exists(int(parent)) and process.cwd() == str(Path.cwd()):
                orphans.add(process)
    if orphans:
        get_run_logger().warning("stop %d processes that a killed flow left", len(orphans))
        send_signal(signal.SIGTERM, orphans)
        kill_after_grace(orphans)


def recover(journal: Journal | None) -> Journal | None:
    """Undo a retraining whose gate has not decided. Complete a rollback. Return the journal of a completed run.

    Raises:
        InputError: MLflow is unreachable, or another branch is checked out.
        StageError: git or DVC failed.
    """
    if journal is None or journal.decision:
        return journal
    if journal.operation == "rollback":
        return apply_rollback(journal)
    if journal.at_gate:  # it may have moved the alias and was then interrupted
        connect()
        now = champion()
        if now and now.tags.get(COMMIT) == git("rev-parse", "HEAD") != journal.commit:
            reason = f"version {now.version} was promoted before the run was interrupted"
            if RUN in now.tags:
                record_decision(now.tags[RUN], "promoted", reason)
            return journal.update(decision={"outcome": "promoted", "reason": reason, "details": describe(now)})
    journal.undo()
    return None


def recover_now() -> None:
    """Recover from a failure in this run. If that fails too, the next run does it."""
    try:
        recover(unfinished())
    except Exception as error:  # noqa: BLE001  # the failure of the run is reported, not this one
        get_run_logger().error("the run could not be undone; the next run undoes it: %s", error)


def apply_rollback(journal: Journal) -> Journal:
    """Do all steps of a rollback, each of which can be repeated. Close the journal.

    Raises:
        StageError: data is neither in DVC's cache nor at its remote; all files are then as before.
    """
    assert journal.versions is not None
    connect()
    now, earlier = (version(number) for number in journal.versions)
    restore_files(earlier.tags[COMMIT], VERSIONED)
    try:
        fetch_missing_data(allow_missing=False)
    except StageError:
        restore_files(journal.commit, VERSIONED)  # the outputs have not changed
        close()
        raise
    restore(earlier.tags[COMMIT], VERSIONED, allow_missing=False)
    commit(journal.messages[0], *VERSIONED)
    landed = {path.name for path in LANDED.glob("*")}
    for name in sorted(set(journal.files) - landed):
        refuse(name, f"rolled back with version {now.version}")
    roll_back(earlier)
    name_sweeps()
    close()
    return journal
