"""Fetch new data files, check them together with the data, and commit them as a new version of the data."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
from fsspec.implementations.local import LocalFileSystem
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from dpo.common.errors import InputError, TransientError
from dpo.common.files import atomic_write, write_json
from dpo.config import RunSettings, load_params
from dpo.data.readers import READERS
from flows.git import commit, dvc
from flows.journal import WORK, Journal
from flows.pipeline import RETRIES
from flows.processes import StageError, command_error, execute
from tasks.commands.landed import REQUEST, RESULT
from tasks.common.addresses import shown
from tasks.common.paths import BASE
from tasks.common.runner import NOT_WRITABLE
from tasks.tracking.registry import LANDED

INCOMING, CHECKED, REFUSED, REPEATED = WORK / "incoming", WORK / "checked", WORK / "refused", WORK / "repeated"
PLACES = WORK / "places.json"
"""The place in the landing folder of each file in `INCOMING`, by name."""
HASH_LENGTH = 16
MAX_NAME_BYTES = 200
"""Of a file's name; a hash and an extension are added to it, and file systems allow 255."""
CHECKED_WITH = "checked with: "
"""Start of the last line of a refusal: a hash of what the refusal depends on."""
CHUNK_BYTES = 2**20


@dataclass
class Arrived:
    """New files in `INCOMING`, and the entries of the landing place that were refused, with the reason."""

    files: list[Path] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """Result of the check of new files, by name."""

    usable: dict[str, dict[str, Any]]
    """For each file that can be used: `path` of the file to take in, number of `rows`, and of `known` ones."""
    refused: dict[str, str]

    @property
    def new(self) -> dict[str, Path]:
        """The files with rows that the data does not have, by the name that they get there."""
        found = {name: file for name, file in self.usable.items() if file["known"] < file["rows"]}
        return {
            name if not file["known"] else f"{name.removesuffix('.jsonl')}.jsonl": Path(file["path"])
            for name, file in found.items()
        }

    @property
    def repeated_rows(self) -> int:
        """Number of rows of these files that the data has already."""
        return sum(file["known"] for file in self.usable.values())


class Unusable(Exception):
    """An entry of the landing place that cannot be copied. The message says why."""


@task(name="fetch new files", cache_policy=NO_CACHE, **RETRIES)
def fetch_new(landing: str) -> Arrived:
    """Copy the data files in `landing` whose content is new, by SHA-256, to `.retrain/incoming/`.

    Skips other files and those whose name begins with a dot. If `landing` does not exist, there are no new files:
    an object store has no folder before the first file is uploaded. Files that an earlier run copied and did not
    take in are new as well. Entries that are no readable, regular files are refused.

    Raises:
        InputError: the URL is invalid, or `landing` is a file of another kind.
        TransientError, StageError: `landing` cannot be read, because of a network fault or another reason.
    """
    try:
        files, root = fsspec.core.url_to_fs(landing)
    except (ImportError, ValueError) as error:
        raise InputError(f"{shown(landing)}: {error}") from error
    INCOMING.mkdir(parents=True, exist_ok=True)
    forget_refusals()
    places = json.loads(PLACES.read_text()) if PLACES.exists() else {}
    known = {path.name[:HASH_LENGTH] for folder in (LANDED, REFUSED, REPEATED) for path in folder.glob("*")}
    for path in INCOMING.iterdir():
        if path.name[:HASH_LENGTH] in known or path.name.startswith("."):
            path.unlink()
    known |= {path.name[:HASH_LENGTH] for path in INCOMING.iterdir()}
    arrived, limits = Arrived(), load_params().run
    try:
        for entry in _entries(files, root, landing):
            try:
                name = _copy_new(files, entry, known, limits)
                places |= {name: shown(entry["name"])} if name else {}
            except Unusable as error:
                _refuse_entry(entry, str(error), known, arrived)
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".replace(landing, shown(landing))
        message = f"{shown(landing)}: cannot be read: {reason}"
        raise (TransientError if _is_transient(error) else StageError)(message) from error
    arrived.files = sorted(INCOMING.glob("[!.]*"))
    write_json(PLACES, {path.name: places.get(path.name, path.name) for path in arrived.files})
    return arrived


def _name(entry: Mapping[str, Any]) -> str:
    return Path(urlsplit(entry["name"]).path if "://" in entry["name"] else entry["name"]).name


def _entries(files: fsspec.AbstractFileSystem, root: str, landing: str) -> Iterator[dict[str, Any]]:
    """Yield the entries that have the name of a data file."""
    try:
        top = files.info(root)
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec raises FileNotFoundError for every fault of HTTP
        if isinstance(cause, aiohttp.ClientError) and getattr(cause, "status", None) not in (404, 410):
            raise cause from None
        get_run_logger().warning("%s: no such file or folder; there are no new files", shown(landing))
        return
    single = top["type"] == "file"
    for entry in [top] if single else _walk(files, root):
        name = _name(entry)
        if "error" in entry or (not name.startswith(".") and Path(name.removesuffix(".gz")).suffix in READERS):
            yield entry
        elif single:
            kinds = ", ".join(READERS)
            raise InputError(f"{shown(landing)}: not a data file; name a folder, or a file that ends in {kinds}")
        else:
            get_run_logger().info("%s is skipped: not a data file", shown(entry["name"]))


def _walk(files: fsspec.AbstractFileSystem, folder: str) -> Iterator[dict[str, Any]]:
    """Yield all entries that are no folders; for a folder that cannot be listed, one with the error."""
    try:
        listing = files.ls(folder, detail=True)
    except PermissionError as error:
        yield {"name": folder, "error": error}
        return
    for entry in sorted(listing, key=lambda entry: os.fsencode(entry["name"])):
        is_other = entry["name"].rstrip("/") != folder.rstrip("/")
        if entry["type"] == "directory" and is_other:
            yield from _walk(files, entry["name"])
        elif is_other and not entry["name"].endswith("/"):
            yield entry


def _copy_new(
    files: fsspec.AbstractFileSystem, entry: Mapping[str, Any], known: set[str], limits: RunSettings
) -> str | None:
    """Copy an entry to `INCOMING` and return the name of the copy, or None if its content is known."""
    name, target = _name(entry), INCOMING / ".new"
    local = isinstance(files, LocalFileSystem)
    if "error" in entry:
        raise Unusable(f"the folder cannot be read: {entry['error']}")
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise Unusable(f"the name has more than {MAX_NAME_BYTES} bytes; shorten it")
    if local:
        _check_regular(entry["name"])
    with target.open("wb+") as copy:
        for chunk in _chunks(files, entry, limits, local):
            copy.write(chunk)
        copy.seek(0)
        start = hashlib.file_digest(copy, "sha256").hexdigest()[:HASH_LENGTH]
    if start in known:
        target.unlink()
        return None
    known.add(start)
    get_run_logger().info("%s is new", shown(entry["name"]))
    stored = f"{start}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}"
    target.rename(INCOMING / stored)
    return stored


def _check_regular(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}; a link needs an existing target") from error
    if not stat.S_ISREG(mode):
        raise Unusable("not a regular file; copy the data to a file")


def _chunks(
    files: fsspec.AbstractFileSystem, entry: Mapping[str, Any], limits: RunSettings, local: bool
) -> Iterator[bytes]:
    """Read an entry within the limits of size and time."""
    size, deadline = 0, time.monotonic() + limits.landed_minutes * 60
    try:
        with files.open(entry["name"], "rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                size += len(chunk)
                if size > limits.landed_mib * 2**20:
                    raise Unusable(f"larger than {limits.landed_mib:g} MiB; split it, or raise run.landed_mib")
                if time.monotonic() > deadline:
                    fix = "split it, or raise run.landed_minutes"
                    raise Unusable(f"not copied after {limits.landed_minutes:g} minutes; {fix}")
                yield chunk
    except OSError as error:
        if not local and _is_transient(error):
            raise
        raise Unusable(f"cannot be read: {error.strerror or error}") from error


def _refuse_entry(entry: Mapping[str, Any], reason: str, known: set[str], arrived: Arrived) -> None:
    """Refuse an entry that has no content to know it by: it is known by its place, size and time."""
    facts = [entry["name"], entry.get("size"), entry.get("mtime"), entry.get("mode"), entry.get("ETag"), reason]
    start = hashlib.sha256(repr(facts).encode(errors="backslashreplace")).hexdigest()[:HASH_LENGTH]
    if start not in known:
        stored = f"{start}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', _name(entry))[:MAX_NAME_BYTES]}"
        text = f"{shown(entry['name'])}: {reason}"
        if refuse(stored, text, checked_with=what_checks_depend_on()):
            arrived.refused[stored] = text


def _is_transient(error: Exception) -> bool:
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in (408, 429) or error.status >= 500
    permanent = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    number = getattr(error, "errno", None)
    return not isinstance(error, permanent) and number not in (*NOT_WRITABLE, errno.EIO)


@task(name="check files", cache_policy=NO_CACHE)
def check_files(files: list[Path]) -> Checked:
    """Check new files together with the data, in one process. Refuse the files that cannot be used.

    A refusal that an earlier check reported with the same reason is not reported again.

    Raises StageError or TransientError if the check itself failed: settings, model, template or disk are at fault.
    """
    places = json.loads(PLACES.read_text())
    write_json(CHECKED / REQUEST, {str(path): places[path.name] for path in files})
    (CHECKED / RESULT).unlink(missing_ok=True)
    command = ["tasks.commands.landed", str(CHECKED)]
    code, lines = execute(command, threading.Event(), get_run_logger())
    if code:
        raise command_error("the check of the new files", lines, transient=code == os.EX_TEMPFAIL)
    result = {Path(path).name: found for path, found in json.loads((CHECKED / RESULT).read_text()).items()}
    refused = {name: found["reason"] for name, found in result.items() if "reason" in found}
    usable = {name: found for name, found in result.items() if "reason" not in found}
    depends = what_checks_depend_on()
    repeated = {
        name: f"all {file['rows']} rows are in the data already"
        for name, file in usable.items()
        if file["known"] == file["rows"]
    }
    for name, reason in repeated.items():
        get_run_logger().info("%s: %s", places[name], reason)
        _record(REPEATED, name, reason, depends)
    reported = {name: reason for name, reason in refused.items() if refuse(name, reason, checked_with=depends)}
    for name in refused | repeated:
        (INCOMING / name).unlink()
    return Checked(usable, reported)


def refuse(name: str, reason: str, checked_with: str | None = None) -> bool:
    """Write `.retrain/refused/NAME.txt` and return whether the reason is new.

    The name begins with the hash, so that the content is not taken in again until `checked_with` changes, or this
    file is deleted.
    """
    former = REFUSED / f".{name}.txt"
    is_new = not former.exists() or _shape(former.read_text().partition(f"\n{CHECKED_WITH}")[0]) != _shape(reason)
    former.unlink(missing_ok=True)
    if is_new:
        get_run_logger().warning("%s is refused: %s", name, reason)
    _record(REFUSED, name, reason, checked_with)
    return is_new


def _shape(reason: str) -> str:
    """Return a reason without numbers, which depend on the other data."""
    return re.sub(r"\d+", "", reason).strip()


def _record(folder: Path, name: str, reason: str, checked_with: str | None) -> None:
    with atomic_write(folder / f"{name}.txt") as tmp:
        tmp.write_text(f"{reason}\n" + (f"{CHECKED_WITH}{checked_with}\n" if checked_with else ""))


def forget_refusals() -> None:
    """Forget refusals and repeats that depend on something which has changed; the files are checked again."""
    now = f"{CHECKED_WITH}{what_checks_depend_on()}"
    for path in [*REFUSED.glob("[!.]*"), *REPEATED.glob("[!.]*")]:
        last = path.read_text().rstrip("\n").rpartition("\n")[2]
        if last.startswith(CHECKED_WITH) and last != now:
            path.rename(path.with_name(f".{path.name}"))  # its reason is compared with that of the next check


def what_checks_depend_on() -> str:
    """Return a hash of settings, data, tokenizer and code, which decide whether a file can be used."""
    code = [path for folder in ("dpo/common", "dpo/data", "dpo/engine") for path in Path(folder).rglob("*.py")]
    model = [path for path in BASE.glob("*") if path.suffix != ".safetensors"]
    digest = hashlib.sha256()
    for path in sorted([*code, *model, Path("params.yaml"), Path(f"{LANDED}.dvc")]):
        if path.is_file():
            digest.update(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:HASH_LENGTH]


@task(name="commit new data", cache_policy=NO_CACHE)
def take_in(journal: Journal, files: Mapping[str, Path]) -> Journal:
    """Copy checked files to `data/own/landed/`, add the folder to DVC and commit its hash."""
    for name, path in files.items():
        with atomic_write(LANDED / name) as tmp:
            shutil.copyfile(path, tmp)
    dvc("add", str(LANDED))
    message = "\n".join([f"Add {count_files(files)} to the data", "", *files])
    journal = journal.update(messages=(*journal.messages, message))
    commit(message, f"{LANDED}.dvc", str(LANDED.parent / ".gitignore"))
    return journal


def count_files(files: Sized) -> str:
    """Return the number of files as text, for example `1 file`."""
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"
