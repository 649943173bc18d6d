"""Make the previous champion the champion again: `python -m flows.rollback`.

The files of git and DVC return to the commit from which the previous champion was promoted, then the alias in
MLflow moves. A second run goes back one more version.
"""

import shutil
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from dpo.common.errors import InputError
from flows.git import commit, default_remote, dvc, git
from flows.landing import refuse
from flows.pipeline import name_flow_run, run_now
from flows.processes import StageError
from flows.retrain import PENDING, notify, run_exclusively
from tasks.common.git import uncommitted
from tasks.tracking.offline import connect
from tasks.tracking.registry import COMMIT, LANDED, VERSIONED, predecessor, roll_back


@flow(name="rollback", flow_run_name=name_flow_run)
def rollback() -> State[str]:
    """Make the champion's predecessor the champion again, with its settings, data, results and checkpoints.

    Returns the version that is now the champion. Files that were added since are refused from now on. Otherwise
    the next retraining would take them in and reach the same policy.

    Raises:
        InputError: there is no predecessor, or files that would be overwritten have uncommitted changes.
        StageError: data is neither in DVC's cache nor at its remote; all files are then as before.
    """
    return run_exclusively(_rollback)


def _rollback() -> State[str]:
    if changed := uncommitted(*VERSIONED):
        fix = "commit them first: a rollback overwrites them"
        raise InputError(f"git: uncommitted changes in {', '.join(changed)}; {fix}")
    connect()
    now, earlier = predecessor()
    before = set(LANDED.glob("*"))
    restore(earlier.tags[COMMIT], f"Roll back from version {now.version} to {earlier.version}")
    for path in sorted(before - set(LANDED.glob("*"))):
        refuse(path.name, f"rolled back with version {now.version}")
    roll_back(earlier)
    PENDING.unlink(missing_ok=True)
    notify("rolled-back", {"from": now.version, "to": earlier.version})
    message = f"version {earlier.version} is the champion again, from commit {earlier.tags[COMMIT][:7]}"
    get_run_logger().info(message)
    return Completed(name="RolledBack", message=message, data=str(earlier.version))


@task(name="restore", cache_policy=NO_CACHE)
def restore(revision: str, message: str) -> None:
    """Restore the versioned files and their DVC data from a commit, and commit them. On failure, undo it."""
    paths = [path for path in VERSIONED if git("ls-files", "--", path) or git("ls-tree", revision, "--", path)]
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


if __name__ == "__main__":
    run_now(rollback)
