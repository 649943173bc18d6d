"""Make the previous champion the champion again: `python -m flows.rollback`.

The files of git and DVC return to the commit from which the previous champion was promoted, then the alias in
MLflow moves. A second run goes back one more version. A run that was interrupted is completed by the next one.
"""

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.artifacts import failure_page
from flows.git import git
from flows.journal import Journal, begin, close
from flows.pipeline import name_flow_run, run_now
from flows.recovery import apply_rollback, run_exclusively
from flows.retrain import notify
from tasks.common.git import uncommitted
from tasks.tracking.offline import connect
from tasks.tracking.registry import COMMIT, LANDED, VERSIONED, predecessor, version


@flow(name="rollback", flow_run_name=name_flow_run)
def rollback() -> State[str]:
    """Make the champion's predecessor the champion again, with its settings, data, results and checkpoints.

    Returns the version that is now the champion. Files that were added since are refused from now on. Otherwise
    the next retraining would take them in and reach the same policy. Uncommitted changes are kept in `git stash`.

    Raises:
        InputError: there is no predecessor, HEAD is detached, or MLflow is unreachable.
        StageError: data is neither in DVC's cache nor at its remote; all files are then as before.
    """
    with failure_page("Rollback"):
        return run_exclusively(_rollback)


def _rollback(done: Journal | None) -> State[str]:
    if done is None or done.operation != "rollback":
        close()  # of a retraining that has ended, except for its push
        done = apply(start())
    assert done.versions is not None
    now, earlier = done.versions
    notify("rolled-back", {"from": now, "to": earlier})
    source = version(earlier).tags[COMMIT]
    message = f"version {earlier} is the champion again, from commit {source[:7]}"
    get_run_logger().info(message)
    return Completed(name="RolledBack", message=message, data=str(earlier))


def start() -> Journal:
    """Write the journal of a rollback, after the uncommitted changes of versioned files were stashed."""
    changed = uncommitted(*VERSIONED)
    connect()
    now, earlier = predecessor()
    git("cat-file", "-e", f"{earlier.tags[COMMIT]}^{{commit}}")
    if changed and (stash := git("stash", "create")):
        git("stash", "store", "--message", f"before the rollback from version {now.version}", stash)
        get_run_logger().warning("uncommitted changes are kept in `git stash list`: %s", ", ".join(changed))
    message = f"Roll back from version {now.version} to {earlier.version}"
    landed = tuple(sorted(path.name for path in LANDED.glob("*")))
    versions = (str(now.version), str(earlier.version))
    return begin("rollback", files=landed, messages=(message,), versions=versions)


@task(name="restore", cache_policy=NO_CACHE)
def apply(journal: Journal) -> Journal:
    """Do all steps of the rollback."""
    return apply_rollback(journal)


if __name__ == "__main__":
    run_now(rollback)
