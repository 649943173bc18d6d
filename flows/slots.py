"""Flow runs of the worker that ended without reporting it, or that run for too long.

The pool runs one flow at a time. A run whose process ended while Prefect's server was down, or that was killed, is
"running" forever for Prefect, and no other run would start.
"""

import itertools
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled, Crashed

from flows.processes import kill_after_grace, send_signal
from tasks.tracking.provenance import FLOW_RUN

WORKERS_RUN = "PREFECT__FLOW_RUN_ID"
"""Variable that Prefect's worker sets for the process of a flow run; its stages inherit it."""
START_SECONDS = 60.0
"""Time for a worker to start the process of a run, and for an ended process to report its state."""
WAITING = "AwaitingConcurrencySlot"
"""Prefect's state of a run that waits for the end of another run of its deployment."""
PAGE = 200
STOP_SECONDS = 300.0
"""Time for a flow that received SIGTERM to undo its changes."""


@dataclass(frozen=True)
class Processes:
    """The processes of a flow run: of the flow itself, and of its stages."""

    flow: set[psutil.Process]
    stages: set[psutil.Process]


def in_pool(pool: str) -> filters.WorkPoolFilter:
    """Return the filter for the runs and deployments of a work pool."""
    return filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[pool]))


def active_runs(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    """Return the runs that take a slot of the pool."""
    active = filters.FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    return _read(client, pool, filters.FlowRunFilter(state=filters.FlowRunFilterState(type=active)))


def _read(client: SyncPrefectClient, pool: str, runs: filters.FlowRunFilter) -> list[FlowRun]:
    """Return all runs of the pool that match; the server returns at most `PAGE` at once."""
    found = dict[Any, FlowRun]()
    for offset in itertools.count(0, PAGE):  # newest first: a run that is created meanwhile is read again
        page = client.read_flow_runs(
            flow_run_filter=runs,
            work_pool_filter=in_pool(pool),
            sort=FlowRunSort.ID_DESC,
            limit=PAGE,
            offset=offset,
        )
        found |= {run.id: run for run in page}
        if len(page) < PAGE:
            break
    return list(found.values())


def release_slots(client: SyncPrefectClient, pool: str, hours: float) -> Iterator[str]:
    """Mark runs without a process as crashed, and stop runs of more than `hours`. Yield a line for each."""
    now = datetime.now(UTC)
    for run in active_runs(client, pool):
        found = _processes(str(run.id))
        changed = run.state.timestamp if run.state else now
        if not found.flow and (now - changed).total_seconds() > START_SECONDS:
            _stop(found.stages)
            yield _crash(client, run, "its process ended without reporting a state")
        elif found.flow and run.start_time and now - run.start_time > timedelta(hours=hours):
            send_signal(signal.SIGTERM, found.flow)
            psutil.wait_procs(found.flow, timeout=STOP_SECONDS)
            _stop(found.flow | found.stages)
            yield _crash(client, run, f"it ran for more than run.flow_hours = {hours:g} hours")


def skip_missed(client: SyncPrefectClient, pool: str) -> Iterator[str]:
    """Cancel the scheduled runs that are due, except the latest one of each deployment. Yield a line for each."""
    now, due = datetime.now(UTC), dict[Any, list[FlowRun]]()
    scheduled = filters.FlowRunFilterStateType(any_=[StateType.SCHEDULED])
    soon = filters.FlowRunFilterExpectedStartTime.model_validate({"before_": now + timedelta(minutes=1)})
    state = filters.FlowRunFilterState(type=scheduled)
    runs = filters.FlowRunFilter(state=state, expected_start_time=soon)
    for run in _read(client, pool, runs):
        is_due = run.state_name == WAITING or (run.expected_start_time and run.expected_start_time <= now)
        if run.auto_scheduled and is_due:
            due.setdefault(run.deployment_id, []).append(run)
    for waiting in due.values():
        *missed, latest = sorted(
            waiting, key=lambda run: (run.state_name != WAITING, run.expected_start_time or now)
        )
        for run in missed:
            client.set_flow_run_state(run.id, Cancelled(message=f"missed; flow run {latest.name} starts instead"))
            yield f"flow run {run.name} was missed and is cancelled; flow run {latest.name} starts instead"


def _crash(client: SyncPrefectClient, run: FlowRun, reason: str) -> str:
    client.set_flow_run_state(run.id, Crashed(message=f"stopped: {reason}"), force=True)
    return f"flow run {run.name} is marked as crashed: {reason}"


def _stop(family: set[psutil.Process]) -> None:
    send_signal(signal.SIGTERM, family)
    kill_after_grace(family)


def _processes(run: str) -> Processes:
    flow, stages = set[psutil.Process](), set[psutil.Process]()
    for process, variables in variables_of_processes():
        if variables.get(WORKERS_RUN) == run:
            (stages if FLOW_RUN in variables else flow).add(process)
    return Processes(flow, stages)


def variables_of_processes() -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """Yield the running processes with their environment variables."""
    for process in psutil.process_iter(["environ", "status"]):
        with suppress(psutil.Error):
            if process.info["status"] != psutil.STATUS_ZOMBIE:
                yield process, process.info["environ"] or {}
