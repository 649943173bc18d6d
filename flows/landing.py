"""Fetch new data files, check each one, and commit them as a new version of the data."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Sequence, Sized
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import fsspec
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from dpo.common.errors import InputError, TransientError
from dpo.common.files import atomic_write
from dpo.data.readers import READERS
from flows.git import commit, dvc, git
from flows.pipeline import RETRIES
from flows.processes import StageError, command_error, execute
from tasks.common.runner import NOT_WRITABLE
from tasks.tracking.registry import LANDED

WORK = Path(".retrain")
INCOMING, CHECKED, REFUSED = WORK / "incoming", WORK / "checked", WORK / "refused"
HASH_LENGTH = 16


@task(name="fetch new files", cache_policy=NO_CACHE, **RETRIES)
def fetch_new(landing: str, pending: Sequence[str]) -> list[Path]:
    """Copy the data files in `landing` whose content is new, by SHA-256, to `.retrain/incoming/`.

    Skips other files and those whose name begins with a dot. If `landing` does not exist, there are no new files:
    an object store has no folder before the first file is uploaded. Keeps `pending`, the names of files that an
    interrupted run has copied. Returns the new copies, each named by its hash and its original name.

    Raises:
        InputError: the URL is invalid, or `landing` is a file of another kind.
        TransientError, StageError: `landing` cannot be read, because of a network fault or another reason.
    """
    for path in INCOMING.glob("*"):
        if path.name not in pending:
            path.unlink()
    known = {path.name[:HASH_LENGTH] for folder in (LANDED, REFUSED) for path in folder.glob("*")}
    known |= {name[:HASH_LENGTH] for name in pending}
    try:
        files, root = fsspec.core.url_to_fs(landing)
    except (ImportError, ValueError) as error:
        raise InputError(f"{landing}: {error}") from error
    try:
        copies = [_copy_new(files, origin, known) for origin in _data_files(files, root, landing)]
    except InputError:
        raise
    except Exception as error:
        message = f"{landing}: cannot be read: {type(error).__name__}: {error}"
        raise (TransientError if _is_transient(error) else StageError)(message) from error
    return [path for path in copies if path]


def _data_files(files: fsspec.AbstractFileSystem, root: str, landing: str) -> list[str]:
    try:
        single = files.info(root)["type"] == "file"
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec raises FileNotFoundError for every fault of HTTP
        if isinstance(cause, aiohttp.ClientError) and getattr(cause, "status", None) not in (404, 410):
            raise cause from None
        get_run_logger().warning("%s: no such file or folder; there are no new files", landing)
        return []
    found = []
    for origin in [root] if single else sorted(files.find(root)):
        name = Path(urlsplit(origin).path).name
        if not name.startswith(".") and Path(name.removesuffix(".gz")).suffix in READERS:
            found.append(origin)
        elif single:
            kinds = ", ".join(READERS)
            raise InputError(f"{landing}: not a data file; name a folder, or a file that ends in {kinds}")
        else:
            get_run_logger().info("%s is skipped: not a data file", origin)
    return found


def _copy_new(files: fsspec.AbstractFileSystem, origin: str, known: set[str]) -> Path | None:
    with atomic_write(INCOMING / "new") as tmp, files.open(origin, "rb") as source, tmp.open("wb+") as target:
        shutil.copyfileobj(source, target)
        target.seek(0)
        start = hashlib.file_digest(target, "sha256").hexdigest()[:HASH_LENGTH]
    if start in known:
        (INCOMING / "new").unlink()
        return None
    known.add(start)
    get_run_logger().info("%s is new", origin)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(urlsplit(origin).path).name)
    return (INCOMING / "new").rename(INCOMING / f"{start}-{name}")


def _is_transient(error: Exception) -> bool:
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in (408, 429) or error.status >= 500
    permanent = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    return not isinstance(error, permanent) and getattr(error, "errno", None) not in NOT_WRITABLE


@task(name="check file", task_run_name="check {path.name}", cache_policy=NO_CACHE)
def check_file(path: Path) -> str | None:
    """Validate one new file. Return None if it can be used, else refuse it and return the reason.

    Raises StageError if the check itself failed.
    """
    metrics = CHECKED / "metrics.json"
    metrics.unlink(missing_ok=True)
    command = ["tasks.commands.cli", "validate", str(path), "--output", str(CHECKED)]
    code, lines = execute(command, threading.Event(), get_run_logger())
    if code == 0:
        return None
    errors = json.loads(metrics.read_text())["errors"] if code == 2 and metrics.exists() else []
    if not errors:
        raise command_error(" ".join(command), lines)
    if [error["code"] for error in errors] == ["empty_split"]:  # another file has pairs in the other split
        return None
    reason = "\n".join(error["message"] for error in errors)
    refuse(path.name, reason)
    path.unlink()
    return reason


def refuse(name: str, reason: str) -> None:
    """Write `.retrain/refused/NAME.txt`. The name begins with the hash, so the content is not taken in again.

    To check the file again in the next run, delete this text file.
    """
    get_run_logger().warning("%s is refused: %s", name, reason)
    with atomic_write(REFUSED / f"{name}.txt") as tmp:
        tmp.write_text(f"{reason}\n")


@task(name="commit new data", cache_policy=NO_CACHE)
def take_in(files: Sequence[str], branch: str | None) -> None:
    """Move checked files to `data/own/landed/`, add the folder to DVC and commit its hash."""
    if branch is not None and git("branch", "--show-current") != branch:
        git("switch", "--quiet", *([] if git("branch", "--list", branch) else ["--create"]), branch)
    LANDED.mkdir(parents=True, exist_ok=True)
    for name in files:
        if (INCOMING / name).exists():
            (INCOMING / name).rename(LANDED / name)
    dvc("add", str(LANDED))
    message = "\n".join([f"Add {count_files(files)} to the data", "", *files])
    commit(message, f"{LANDED}.dvc", str(LANDED.parent / ".gitignore"))


def count_files(files: Sized) -> str:
    """Return the number of files as text, for example `1 file`."""
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"
