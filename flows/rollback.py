"""Make the previous champion the champion again: `python -m flows.rollback`.

The files of git and DVC return to the commit from which the previous champion was promoted, then the alias in
MLflow moves. A second run goes back one more version.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from dpo.common.errors import InputError
from flows.git import commit, default_remote, dvc, git, tracked
from flows.landing import refuse
from flows.pipeline import name_flow_run, run_now
from flows.processes import StageError
from flows.retrain import PENDING, notify, run_exclusively
from tasks.common.git import uncommitted
from tasks.tracking import registry
from tasks.tracking.offline import connect
from tasks.tracking.registry import COMMIT, LANDED, VERSIONED


@dataclass(frozen=True)
class RolledBack:
    """Versions of the registered model before and after a rollback, and the commit of the restored one."""

    version: str
    to: str
    git_commit: str


@flow(name="rollback", flow_run_name=name_flow_run)
def rollback() -> State[RolledBack]:
    """Make the champion's predecessor the champion again, with its settings, data, results and checkpoints.

    Files that were added since are refused from now on. Otherwise the next retraining would take them in and reach
    the same policy.

    Raises:
        InputError: there is no predecessor, or files that would be overwritten have uncommitted changes.
        StageError: data is neither in DVC's cache nor at its remote; all files are then as before.
    """
    return run_exclusively(_rollback)


def _rollback() -> State[RolledBack]:
    if changed := uncommitted(*VERSIONED):
        raise InputError(
            f"git: uncommitted changes in {', '.join(changed)}; commit them first: a rollback overwrites them"
        )
    connect()
    now, earlier = registry.predecessor()
    before = landed()
    restore(earlier.tags[COMMIT], f"Roll back from version {now.version} to {earlier.version}")
    for name in sorted(before - landed()):
        refuse(name, f"rolled back with version {now.version}")
    registry.roll_back(earlier)
    PENDING.unlink(missing_ok=True)
    notify("rolled-back", {"from": now.version, "to": earlier.version})
    done = RolledBack(str(now.version), str(earlier.version), earlier.tags[COMMIT])
    message = f"version {done.to} is the champion again, from commit {done.git_commit[:7]}"
    get_run_logger().info(message)
    return Completed(name="RolledBack", message=message, data=done)


def landed() -> set[str]:
    """Return the names of the files in `data/own/landed/`."""
    return {path.name for path in LANDED.glob("*")}


@task(name="restore", cache_policy=NO_CACHE)
def restore(revision: str, message: str) -> None:
    """Restore the versioned files and their DVC data from a commit, and commit them. On failure, undo it."""
    paths = tracked(VERSIONED, revision)
    try:
        check_out(revision, paths)
    except StageError:
        check_out("HEAD", paths)
        raise
    commit(message, *paths)


def check_out(revision: str, paths: list[str]) -> None:
    """Restore files of git from a commit, and DVC's data from its cache, else from its remote."""
    git("restore", f"--source={revision}", "--staged", "--worktree", "--", *paths)
    if not Path(f"{LANDED}.dvc").exists() and LANDED.exists():
        shutil.rmtree(LANDED)  # that commit has no landed files; the current ones are in DVC's cache
    try:
        dvc("checkout")
    except StageError:
        if default_remote() is None:
            raise
        dvc("pull")


def main() -> int:
    """Roll back now. Exit with 1 on failure, else with 0, also if another run is active."""
    state = run_now(rollback)
    return 0 if state.is_completed() or state.is_cancelled() else 1


if __name__ == "__main__":
    sys.exit(main())
