"""Retrain on what has landed: `python -m flows.retrain LANDING [--branch NAME] [--parallel N] [--no-push]`.

New files become a new version of the data, the pipeline runs, and the gate decides whether the policy that comes
out is promoted. Nothing new, nothing done. A run that was cut off is taken up again by the next one: every step
may be repeated, and `.retrain/pending` tells that steps are owed.
"""

import argparse
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
from filelock import FileLock, Timeout
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from pydantic import PositiveInt

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import load_params
from dpo.data.readers import READERS
from flows.artifacts import if_there
from flows.git import commit, default_remote, dvc, git, module, switch
from flows.pipeline import (
    PATIENT,
    TAIL_LINES,
    StageError,
    execute,
    name_flow_run,
    pipeline,
    run_now,
)
from tasks.common.git import uncommitted
from tasks.tracking.registry import GATE, LANDED, VERSIONED

WORK = Path(".retrain")
LOCK, PENDING, INCOMING, REFUSED = WORK / "lock", WORK / "pending", WORK / "incoming", WORK / "refused"
HASH_LENGTH = 16
CHUNK = 2**20
EMPTY_SPLIT = "no sound pair is in split"
"""What the check says of a file that has pairs for one split only: no fault, the other files have the rest."""


@dataclass(frozen=True)
class Retrained:
    """What a retraining came to."""

    outcome: str
    """`promoted`, `kept` or `refused`."""
    reason: str
    new: tuple[str, ...]
    """Names of the files that were taken in, under `data/own/landed/`."""
    refused: dict[str, str]
    """Names of the files that were not, with the reason."""


@flow(name="retrain", flow_run_name=name_flow_run)
def retrain(
    landing: str, branch: str | None = None, parallel: PositiveInt = 1, push: bool = True
) -> State[Retrained]:
    """Take in new files, bring the pipeline up to date, let the gate decide; one retraining of a checkout at once.

    Args:
        landing: a file or a folder, or the URL of one, such as s3://bucket/folder; of http only of a file.
        branch: where to commit, made from the current one if it is not there; by default the current one.
        parallel: stages that run at once.
        push: send new data and results to DVC's default remote, if there is one.

    Returns:
        A state: Promoted, Kept or Refused with what happened, NothingNew, or AlreadyRunning.

    Raises:
        InputError, StageError: nothing can be taken in here, or a step failed; the next run goes on from there.
    """
    return alone(lambda: _retrain(landing, branch, parallel, push))


def alone(work: Callable[[], State[Any]]) -> State[Any]:
    """Do this unless a retraining or a rollback of this checkout is at work: then end as AlreadyRunning."""
    LOCK.parent.mkdir(exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            return work()
    except Timeout:
        words = f"another retraining or rollback holds {LOCK}; this one did nothing"
        get_run_logger().warning(words)
        return Cancelled(name="AlreadyRunning", message=words)


def _retrain(landing: str, branch: str | None, parallel: int, push: bool) -> State[Retrained]:
    pending = json.loads(PENDING.read_text()) if PENDING.exists() else None
    owed, decided = ([], None) if pending is None else (pending["files"], pending.get("gate"))
    if pending is not None:
        get_run_logger().warning("an earlier run was cut off; this one goes on with its %d files", len(owed))
    arrived = fetch_new(landing, owed)
    if not arrived and pending is None:
        return Completed(name="NothingNew", message=f"{landing} holds no file that is not known already")
    check_project()
    refused = {path.name: reason for path in arrived if (reason := check_file(path))}
    new = [*owed, *(path.name for path in arrived if path.name not in refused)]
    if refused:
        notify("refused", {"files": refused})
    if not new and pending is None:
        return report(Retrained("refused", "No new file is sound: the data stays as it was.", (), refused))
    if decided is None or len(new) > len(owed):
        write_json(PENDING, {"files": new})
        take_in(new, branch)
        pipeline(parallel)
        keep_results(new)
        decided = ask_gate()
        write_json(PENDING, {"files": new, "gate": decided})
        notify(decided["outcome"], {"reason": decided["reason"], "files": new})
    if push:
        push_results()
    PENDING.unlink()
    return report(Retrained(**decided, new=tuple(new), refused=refused))


@task(name="check project", cache_policy=NO_CACHE)
def check_project() -> None:
    """Whether a retraining can work here.

    Raises:
        InputError: params.yaml does not read `data/own/landed`, or tracked files differ from git's last commit.
    """
    source = load_params().data.source
    names = [source] if isinstance(source, str) else source
    if not any(Path(name) in (LANDED, LANDED.parent) for name in names):
        raise InputError(
            f"params.yaml: data.source: {source!r} does not read {LANDED}, the folder of new files; name it "
            "there, alone or in a list beside other files"
        )
    own = tuple(path for path in VERSIONED if not path.endswith(".yaml"))
    if changed := [path for path in uncommitted() if not path.startswith(own)]:
        raise InputError(
            f"git: not committed: {', '.join(changed)}; commit first, so that the results have a commit"
        )
    git("var", "GIT_COMMITTER_IDENT")


@task(name="look for new files", cache_policy=NO_CACHE, **PATIENT)
def fetch_new(landing: str, owed: Sequence[str]) -> list[Path]:
    """Copy what is in `landing` and not known here, by the SHA-256 of its content, to `.retrain/incoming/`.

    Files of other kinds, and those whose name begins with a dot, are left alone. A place that is not there holds
    nothing: before the first file lands, an object store has no such folder.

    Args:
        landing: a file, a folder, or a URL.
        owed: names of files that an earlier run has copied there already.

    Returns:
        The copies, each named for its hash and its origin.

    Raises:
        InputError: the URL is none, or names a file of no accepted kind.
        StageError: it cannot be read.
    """
    for path in INCOMING.glob("*"):
        if path.name not in owed:
            path.unlink()
    known = {path.name[:HASH_LENGTH] for folder in (LANDED, REFUSED) for path in folder.glob("*")}
    known |= {name[:HASH_LENGTH] for name in owed}
    try:
        files, place = fsspec.core.url_to_fs(landing)
    except (ImportError, ValueError) as error:
        raise InputError(f"{landing}: {error}") from error
    arrived = []
    try:
        try:
            single = files.info(place)["type"] == "file"
        except FileNotFoundError as error:
            cause = error.__cause__  # of http, which says this of every fault
            if isinstance(cause, aiohttp.ClientError) and getattr(cause, "status", None) not in (404, 410):
                raise cause from None
            get_run_logger().warning("%s: no such file or folder; nothing has landed there yet", landing)
            return []
        for origin in [place] if single else sorted(files.find(place)):
            name = Path(urlsplit(origin).path).name
            if name.startswith(".") or Path(name.removesuffix(".gz")).suffix not in READERS:
                if single:
                    kinds = ", ".join(READERS)
                    raise InputError(
                        f"{landing}: no data file; accepted are folders, and files that end in {kinds}"
                    )
                get_run_logger().info("%s is left alone: no data file by its name", origin)
                continue
            with atomic_write(INCOMING / "new") as tmp:
                digest = _copy(files, origin, tmp)
            path = INCOMING / f"{digest[:HASH_LENGTH]}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}"
            if digest[:HASH_LENGTH] in known:
                (INCOMING / "new").unlink()
                continue
            known.add(digest[:HASH_LENGTH])
            (INCOMING / "new").rename(path)
            arrived.append(path)
            get_run_logger().info("%s is new", origin)
    except InputError:
        raise
    except aiohttp.ClientResponseError as error:
        raise StageError(f"{landing}: cannot be read: {error.status} {error.message}") from error
    except Exception as error:
        raise StageError(f"{landing}: cannot be read: {type(error).__name__}: {error}") from error
    return arrived


def _copy(files: fsspec.AbstractFileSystem, origin: str, to: Path) -> str:
    digest = hashlib.sha256()
    with files.open(origin, "rb") as source, to.open("wb") as target:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


@task(name="check", task_run_name="check {path.name}", cache_policy=NO_CACHE)
def check_file(path: Path) -> str | None:
    """Hold one new file alone against the contract; why it must not be used, None if it may.

    A refused file is put away with its reason, by which it is known: it is not checked again. Deleting
    `.retrain/refused/NAME.txt` has the next run look at it anew.

    Raises:
        StageError: the check itself failed.
    """
    command = ["tasks.commands.cli", "validate", str(path), "--output", str(WORK / "checked")]
    code, lines = execute(command, threading.Event(), get_run_logger())
    if code == 0:
        return None
    start = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    if code != 2 or start is None:
        raise StageError("\n".join([f"{' '.join(command)} failed; its last output:", *lines[-TAIL_LINES:]]))
    faults = lines[start:]
    if len(faults) == 1 and EMPTY_SPLIT in faults[0]:
        return None
    reason = "\n".join(faults).removeprefix("error: ")
    refuse(path.name, reason)
    path.unlink()
    return reason


def refuse(name: str, reason: str) -> None:
    """Remember by name, which begins with its hash, that a file is not to be taken in."""
    get_run_logger().warning("%s is refused: %s", name, reason)
    with atomic_write(REFUSED / f"{name}.txt") as tmp:
        tmp.write_text(f"{reason}\n")


@task(name="new version of the data", cache_policy=NO_CACHE)
def take_in(files: Sequence[str], branch: str | None) -> None:
    """Move checked files to `data/own/landed/`, version the folder with DVC and commit its hash."""
    if branch is not None:
        switch(branch)
    LANDED.mkdir(parents=True, exist_ok=True)
    for name in files:
        if (INCOMING / name).exists():
            (INCOMING / name).rename(LANDED / name)
    dvc("add", str(LANDED))
    message = f"{_files(len(files))} landed: {', '.join(files)}"
    commit(message, f"{LANDED}.dvc", str(LANDED.parent / ".gitignore"))


@task(name="commit results", cache_policy=NO_CACHE)
def keep_results(files: Sequence[str]) -> None:
    """Commit what the pipeline made: the hashes of its outputs, and its figures."""
    commit(f"Retrained on {_files(len(files))}: {', '.join(files)}", "dvc.lock", "metrics")


@task(name="gate", cache_policy=NO_CACHE)
def ask_gate() -> dict[str, str]:
    """Promote the selected policy if it is better than the champion; the outcome and the reason."""
    module("tasks.commands.cli", "promote")
    with if_there():
        create_markdown_artifact(GATE.with_suffix(".md").read_text(), key="gate")
    verdict = json.loads(GATE.read_text())
    return {"outcome": "promoted" if verdict["promoted"] else "kept", "reason": verdict["reason"]}


@task(name="push", cache_policy=NO_CACHE, **PATIENT)
def push_results() -> None:
    """Send data, checkpoints and results to DVC's default remote."""
    if default_remote() is None:
        get_run_logger().warning(
            "not pushed: DVC has no default remote; `dvc remote add --default NAME URL` names one"
        )
        return
    dvc("push")


def notify(outcome: str, facts: dict[str, Any]) -> None:
    """Emit the event `dpo.retrain.OUTCOME`, on which a Prefect automation can send a message."""
    project = Path.cwd().name
    emit_event(
        event=f"dpo.retrain.{outcome}",
        resource={"prefect.resource.id": f"dpo.retrain.{project}", "prefect.resource.name": project},
        related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
        payload=facts,
    )


def report(done: Retrained) -> State[Retrained]:
    """The end of a run, as a page and as a state."""
    lines = [f"## Retraining: {done.outcome}", "", done.reason, "", *(f"- new: `{name}`" for name in done.new)]
    lines += [f"- refused: `{name}`: {reason}" for name, reason in done.refused.items()]
    with if_there():
        create_markdown_artifact("\n".join([*lines, ""]), key="retrain")
    counts = f"{_files(len(done.new))} new, {_files(len(done.refused))} refused"
    return Completed(name=done.outcome.capitalize(), message=f"{counts}: {done.reason}", data=done)


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def main() -> int:
    """Retrain now; exit code 1 on failure, 0 else, also where nothing is new or another run is at work."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description=main.__doc__)
    parser.add_argument("landing", help="a file or a folder, or the URL of one, that new data files come to")
    parser.add_argument("--branch", help="where to commit (default: the current branch)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="stages at once (default: 1)")
    parser.add_argument("--no-push", dest="push", action="store_false", help="send nothing to DVC's remote")
    state = run_now(retrain, **vars(parser.parse_args()))
    return 0 if state.is_completed() or state.is_cancelled() else 1


if __name__ == "__main__":
    sys.exit(main())
