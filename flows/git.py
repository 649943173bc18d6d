"""Git and DVC commands that change files."""

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import psutil
from dvc.lock import make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from dvc.stage.cache import RunCacheNotFoundError, RunCacheNotSupported
from prefect import get_run_logger

from dpo.common.errors import InputError
from flows.processes import Logger, StageError, run_module
from tasks.common.addresses import without_credentials

T = TypeVar("T")
log = logging.getLogger(__name__)
OUTAGE_SECONDS = 1800.0
"""How long a run waits for DVC's remote."""
RETRY_SECONDS = 5.0
_THREADS = threading.Lock()


def git(*arguments: str, stdin: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run git and return its output. Raise StageError with git's message if it fails."""
    variables = {**os.environ, **(env or {})}
    done = subprocess.run(
        ["git", *arguments], input=stdin, capture_output=True, text=True, check=False, env=variables
    )
    if done.returncode:
        raise StageError(without_credentials(f"git {arguments[0]}: {(done.stderr or done.stdout).strip()}"))
    return done.stdout.strip()


def dvc(*arguments: str, logger: "Logger | None" = None) -> list[str]:
    """Run DVC as soon as no other DVC command holds its lock; see `run_module`."""
    return run_module("dvc", "--wait-for-lock", *arguments, logger=logger)


def default_remote() -> str | None:
    """Return the name of DVC's default remote."""
    with open_repo() as repo:
        return repo.config["core"].get("remote")


@contextmanager
def open_repo() -> Iterator[Repo]:
    """Yield the DVC repository to one thread at a time. DVC's checks of its files fail in several threads."""
    with _THREADS, Repo(_wait_for_lock=True) as repo:
        _delete_damaged_lock(repo)
        yield repo


def _delete_damaged_lock(repo: Repo) -> None:
    """Delete DVC's list of the files in use if a killed command wrote a part of it; with it, all commands fail."""
    file, guard = Path(repo.tmp_dir, RWLOCK_FILE), Path(repo.tmp_dir, RWLOCK_LOCK)
    if _is_json(file):
        return
    hardlink = repo.config["core"].get("hardlink_lock", False)
    with make_lock(str(guard), tmp_dir=repo.tmp_dir, hardlink_lock=hardlink):
        if not _is_json(file):  # and no command is writing it
            file.unlink()
            log.warning("%s: deleted; a DVC command was killed while it wrote the file", file)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


@contextmanager
def locked_repo() -> Iterator[Repo]:
    """Yield the DVC repository as `open_repo` does, locked for other DVC commands."""
    with open_repo() as repo, repo.lock:
        yield repo


def lacks_outputs(stage: str) -> bool:
    """Return whether an unchanged stage lacks an output with `cache: false`, such as a metric."""
    with locked_repo() as repo:
        (target,) = repo.stage.collect(stage)
        missing = any(not out.use_cache and not out.exists for out in target.outs)
        return missing and not target.changed(allow_missing=True)


def restore_outputs(stage: str) -> bool:
    """Restore all outputs of a stage from the record of its run, and return whether DVC or its remote has them.

    `dvc repro --pull` and `dvc pull` leave out outputs with `cache: false`.
    """
    with locked_repo() as repo:
        (target,) = repo.stage.collect(stage)
        with suppress(RunCacheNotSupported):
            repo.stage_cache.pull(None)
        try:
            repo.stage_cache.restore(target, pull=True)
        except RunCacheNotFoundError:
            return False
    return True


def remote_answers() -> bool:
    """Return whether DVC's default remote answers. A refusal, such as that of credentials, is an answer."""
    try:
        with open_repo() as repo:
            remote = repo.cloud.get_remote_odb(None, "push")
        remote.fs.exists(remote.path)  # it can take long, and other threads use the repository meanwhile
    except Exception as error:  # noqa: BLE001 - each kind of storage has errors of its own
        return not _is_connection_fault(error)
    return True


def _is_connection_fault(error: BaseException | None) -> bool:
    """Return whether an error was caused by one of the operating system, as a refused or lost connection is."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, PermissionError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def through_outages(work: Callable[[], T], stop: threading.Event, logger: Logger) -> T:
    """Return `work()`. If it fails while DVC's remote does not answer, wait for the remote and repeat the work.

    After `OUTAGE_SECONDS`, or on `stop`, the error of the work is raised.
    """
    while True:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - raised below, if it is not an outage
            failure = error
        if stop.is_set() or remote_answers():  # not in the `except`, which would replace the cause of errors there
            raise failure
        deadline = time.monotonic() + OUTAGE_SECONDS
        reason = without_credentials(str(failure)).strip().rpartition("\n")[2]
        logger.warning("DVC's remote does not answer; the work is repeated when it does: %s", reason)
        while not stop.is_set() and not remote_answers():
            if time.monotonic() > deadline:
                raise failure
            stop.wait(RETRY_SECONDS)


def current_branch() -> str:
    """Return the current branch. Raise InputError if HEAD is detached: commits would belong to no branch."""
    if not (branch := git("branch", "--show-current")):
        raise InputError(
            "git: HEAD is detached, so commits would be lost; switch to a branch: `git switch BRANCH`"
        )
    return branch


def commit(message: str, *paths: str) -> None:
    """Commit the changes under `paths` and no others. Without changes, do nothing."""
    known = [path for path in paths if os.path.lexists(path) or git("ls-files", "--", path)]
    git("add", "--", *known)
    if git("diff", "--cached", "--name-only", "--", *known):
        git("commit", "--quiet", "--file=-", "--", *known, stdin=message)  # it can be too long for an argument
        get_run_logger().info("git: %s", git("log", "-1", "--format=%h %s"))


@contextmanager
def _index_of(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the environment of a temporary index that has all files under `paths`, also untracked ones."""
    with TemporaryDirectory(prefix="dpo-index-") as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        if existing := [path for path in paths if os.path.lexists(path)]:
            git("add", "--", *existing, env=env)
        yield env


def snapshot(paths: Sequence[str]) -> str:
    """Store the files under `paths` as they are now in git's object store; return the id of their tree."""
    with _index_of(paths) as env:
        return git("write-tree", env=env)


def snapshot_commit(*paths: str) -> str:
    """Return a commit on no branch that has the tracked files, and those under `paths`, as they are now."""
    with _index_of(()) as env:
        git("read-tree", "HEAD", env=env)
        git("add", "--update", env=env)
        git("add", "--", *(path for path in paths if os.path.lexists(path)), env=env)
        return git("commit-tree", git("write-tree", env=env), "-p", "HEAD", "-m", "Snapshot of the working tree")


def restore_files(source: str, paths: Sequence[str]) -> None:
    """Make the files under `paths` equal to those of a commit or a tree; delete files that it does not have."""
    with _index_of(paths) as env:
        known = [path for path in paths if os.path.lexists(path) or git("ls-tree", source, "--", path)]
        if known:
            git("restore", f"--source={source}", "--staged", "--worktree", "--", *known, env=env)
    git("reset", "--quiet", "--", *paths)


def fetch_missing_data(*, allow_missing: bool) -> None:
    """Fetch the data of `dvc.lock` that is not in DVC's cache from the default remote. No output changes.

    Raises:
        StageError: data is in neither place, unless `allow_missing`.
    """
    if missing := _not_in_cache():
        if default_remote() is not None:
            try:
                dvc("fetch")
            except StageError as error:
                if not allow_missing:
                    raise StageError(f"{error}\nmissing in DVC's cache: {', '.join(missing)}") from error
        elif not allow_missing:
            raise StageError(f"missing in DVC's cache, and there is no default remote: {', '.join(missing)}")


def check_out_data(*, allow_missing: bool) -> None:
    """Make DVC's outputs equal to `dvc.lock`. Outputs whose data is missing are deleted if `allow_missing`.

    Raises:
        StageError: data is neither in DVC's cache nor at the default remote; no output has changed.
    """
    fetch_missing_data(allow_missing=allow_missing)
    dvc("checkout", "--force", *(["--allow-missing"] if allow_missing else []))


def _not_in_cache() -> list[str]:
    with locked_repo() as repo:
        outs = [out for out in repo.index.outs if out.use_cache and out.hash_info]
        return [os.path.relpath(out.fs_path) for out in outs if out.changed_cache()]


def remove_dead_locks() -> None:
    """Remove locks that a killed git command left, unless a git command runs in this checkout."""
    top = Path(git("rev-parse", "--show-toplevel"))
    folder = Path(git("rev-parse", "--absolute-git-dir"))
    locks = [*folder.glob("*.lock"), *(folder / "refs").rglob("*.lock")]
    if not locks or any(_runs_in(top, process) for process in psutil.process_iter(["name"])):
        return
    for lock in locks:
        lock.unlink(missing_ok=True)
        get_run_logger().warning("%s: removed; no git command is running", lock)


def _runs_in(folder: Path, process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.info["name"] == "git" and Path(process.cwd()).is_relative_to(folder)
    return False
