"""Go back to the champion before this one: `python -m flows.rollback`.

The files of git and DVC return to the commit that the earlier champion was promoted from, then MLflow's alias
moves. A second run goes back one more.
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
from flows.git import commit, default_remote, dvc, git, known
from flows.pipeline import StageError, name_flow_run, run_now
from flows.retrain import PENDING, alone, notify, refuse
from tasks.common.git import uncommitted
from tasks.tracking import registry
from tasks.tracking.offline import connect
from tasks.tracking.registry import COMMIT, LANDED, VERSIONED


@dataclass(frozen=True)
class RolledBack:
    """Which version of the registered model served, which serves now, and the commit that it was made from."""

    version: str
    to: str
    git_commit: str


@flow(name="rollback", flow_run_name=name_flow_run)
def rollback() -> State[RolledBack]:
    """Make the champion's predecessor the champion again, with its settings, data, results and checkpoints.

    Files that landed since are remembered as refused: the next retraining would otherwise take them in and come to
    the same policy.

    Raises:
        InputError: there is no predecessor, or files that would be overwritten differ from git's last commit.
        StageError: data is neither in DVC's cache nor at its remote; all is then as it was before.
    """
    return alone(_rollback)


def _rollback() -> State[RolledBack]:
    if changed := uncommitted(*VERSIONED):
        raise InputError(
            f"git: not committed: {', '.join(changed)}; a rollback would overwrite them: commit first"
        )
    connect()
    now, earlier = registry.predecessor()
    before = landed()
    restore(earlier.tags[COMMIT], f"Rolled back from version {now.version} to {earlier.version}")
    for name in sorted(before - landed()):
        refuse(name, f"rolled back with version {now.version}")
    registry.roll_back(earlier)
    PENDING.unlink(missing_ok=True)
    notify("rolled-back", {"from": now.version, "to": earlier.version})
    done = RolledBack(str(now.version), str(earlier.version), earlier.tags[COMMIT])
    words = f"version {done.to} is the champion again, as of commit {done.git_commit[:7]}"
    get_run_logger().info(words)
    return Completed(name="RolledBack", message=words, data=done)


def landed() -> set[str]:
    """Names of the files that were taken in."""
    return {path.name for path in LANDED.glob("*")}


@task(name="restore", cache_policy=NO_CACHE)
def restore(revision: str, message: str) -> None:
    """Bring the versioned files and what they name back to a commit, as a new commit; or leave all as it was."""
    paths = known(VERSIONED, revision)
    try:
        check_out(revision, paths)
    except StageError:
        check_out("HEAD", paths)
        raise
    commit(message, *paths)


def check_out(revision: str, paths: list[str]) -> None:
    """Files of git from a commit, and those of DVC from its cache, or else from its remote."""
    git("restore", f"--source={revision}", "--staged", "--worktree", "--", *paths)
    if not Path(f"{LANDED}.dvc").exists() and LANDED.exists():
        shutil.rmtree(LANDED)  # nothing had landed then; what did since is in DVC's cache
    try:
        dvc("checkout")
    except StageError:
        if default_remote() is None:
            raise
        dvc("pull")


def main() -> int:
    """Roll back now; exit code 1 on failure, 0 else, also where another run is at work."""
    state = run_now(rollback)
    return 0 if state.is_completed() or state.is_cancelled() else 1


if __name__ == "__main__":
    sys.exit(main())
