"""Retrain on new data files: `python -m flows.retrain LANDING [--branch NAME] [--parallel N] [--no-push]`.

New files become a new version of the data, the pipeline runs, and the gate decides whether to promote the
selected policy. Without new files, nothing changes. The next run resumes an interrupted one: every step can be
repeated, and `.retrain/pending` exists until the last step is done.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from pydantic import PositiveInt

from dpo.common.errors import InputError, TransientError
from dpo.common.files import write_json
from dpo.config import load_params
from flows.artifacts import ignore_outage
from flows.git import commit, default_remote, dvc, git
from flows.landing import WORK, check_file, count_files, fetch_new, take_in
from flows.pipeline import RETRIES, name_flow_run, pipeline, run_now
from flows.processes import StageError, run_module
from tasks.common.git import uncommitted
from tasks.tracking.registry import GATE, LANDED, VERSIONED

LOCK, PENDING = WORK / "lock", WORK / "pending"


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining: `promoted`, `kept` or `refused`, the added files, and why files were refused."""

    outcome: str
    reason: str
    new: tuple[str, ...]
    refused: dict[str, str]


@flow(name="retrain", flow_run_name=name_flow_run)
def retrain(
    landing: str, branch: str | None = None, parallel: PositiveInt = 1, push: bool = True
) -> State[Retrained]:
    """Take in new files, bring the pipeline up to date, and promote the policy if the gate allows it.

    Returns the state Promoted, Kept or Refused with a `Retrained`, NothingNew, or AlreadyRunning. Raises
    InputError if the project is not ready, StageError or TransientError if a step fails; the next run resumes it.

    Args:
        landing: a file or a folder, or the URL of one, such as s3://bucket/folder; an http URL must name a file.
        branch: where to commit; created from the current branch if it does not exist. Default: the current branch.
        parallel: stages to run at once.
        push: send new data and results to DVC's default remote, if there is one.
    """
    return run_exclusively(lambda: _retrain(landing, branch, parallel, push))


def run_exclusively(work: Callable[[], State[Any]]) -> State[Any]:
    """Run `work`, or return AlreadyRunning if another retraining or rollback of this checkout runs."""
    LOCK.parent.mkdir(exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            return work()
    except Timeout:
        message = f"another retraining or rollback holds {LOCK}; this run did nothing"
        get_run_logger().warning(message)
        return Cancelled(name="AlreadyRunning", message=message)


def _retrain(landing: str, branch: str | None, parallel: int, push: bool) -> State[Retrained]:
    pending = json.loads(PENDING.read_text()) if PENDING.exists() else None
    earlier, decision = ([], None) if pending is None else (pending["files"], pending.get("gate"))
    if pending is not None:
        get_run_logger().warning("resume the interrupted run with %s", count_files(earlier))
    arrived = fetch_new(landing, earlier)
    if not arrived and pending is None:
        return Completed(name="NothingNew", message=f"{landing} has no new file")
    check_project()
    check_gate()
    refused = {path.name: reason for path in arrived if (reason := check_file(path))}
    new = [*earlier, *(path.name for path in arrived if path.name not in refused)]
    if refused:
        notify("refused", {"files": refused})
    if not new and pending is None:
        return report(Retrained("refused", "No new file is valid: the data is unchanged.", (), refused))
    if decision is None or len(new) > len(earlier):
        write_json(PENDING, {"files": new})
        take_in(new, branch)
        pipeline(parallel)
        commit_results(new)
        decision = run_gate()
        write_json(PENDING, {"files": new, "gate": decision})
        notify(decision["outcome"], {"reason": decision["reason"], "files": new})
    if push:
        push_results()
    PENDING.unlink()
    return report(Retrained(**decision, new=tuple(new), refused=refused))


@task(name="check project", cache_policy=NO_CACHE)
def check_project() -> None:
    """Raise InputError if the project cannot take in new files, StageError if git has no committer identity."""
    data = load_params().data
    if not any(source.path and Path(source.path) in (LANDED, LANDED.parent) for source in data.sources):
        raise InputError(
            f"params.yaml: data.source: {data.origin!r} does not contain {LANDED}, the folder of new files; add "
            f"it, for example data.source: [data/own/pairs.jsonl, {LANDED}]"
        )
    versioned = tuple(path for path in VERSIONED if not path.endswith(".yaml"))
    if changed := [path for path in uncommitted() if not path.startswith(versioned)]:
        fix = "commit them first, so that the results belong to a commit"
        raise InputError(f"git: uncommitted changes in {', '.join(changed)}; {fix}")
    git("var", "GIT_COMMITTER_IDENT")


@task(name="check gate", cache_policy=NO_CACHE)
def check_gate() -> None:
    """Stop if MLflow's registry was changed by hand; report if the held-out prompts are too few to promote."""
    run_module("tasks.commands.cli", "promote", "--check")


@task(name="commit results", cache_policy=NO_CACHE)
def commit_results(files: Sequence[str]) -> None:
    """Commit the results of the pipeline: the hashes of its outputs, and its metrics."""
    commit("\n".join([f"Retrain on {count_files(files)}", "", *files]), "dvc.lock", "metrics")


@task(name="promotion gate", cache_policy=NO_CACHE)
def run_gate() -> dict[str, str]:
    """Promote the selected policy if it is better than the champion; return the outcome and the reason."""
    run_module("tasks.commands.cli", "promote")
    with ignore_outage():
        create_markdown_artifact(GATE.with_suffix(".md").read_text(), key="gate")
    verdict = json.loads(GATE.read_text())
    return {"outcome": "promoted" if verdict["promoted"] else "kept", "reason": verdict["reason"]}


@task(name="push", cache_policy=NO_CACHE, **RETRIES)
def push_results() -> None:
    """Send data, checkpoints and results to DVC's default remote. Raise TransientError if that fails."""
    if default_remote() is None:
        fix = "add one with `dvc remote add --default NAME URL`"
        get_run_logger().warning("not pushed: DVC has no default remote; %s", fix)
        return
    try:
        dvc("push")
    except StageError as error:  # DVC's exit code does not say why
        raise TransientError(str(error)) from error


def notify(outcome: str, details: dict[str, Any]) -> None:
    """Emit the event `dpo.retrain.OUTCOME`, which can trigger a Prefect automation."""
    project = Path.cwd().name
    emit_event(
        event=f"dpo.retrain.{outcome}",
        resource={"prefect.resource.id": f"dpo.retrain.{project}", "prefect.resource.name": project},
        related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
        payload=details,
    )


def report(done: Retrained) -> State[Retrained]:
    """Publish the result as an artifact and return it as a state."""
    lines = [f"## Retraining: {done.outcome}", "", done.reason, "", *(f"- new: `{name}`" for name in done.new)]
    lines += [f"- refused: `{name}`: {reason}" for name, reason in done.refused.items()]
    with ignore_outage():
        create_markdown_artifact("\n".join([*lines, ""]), key="retrain")
    counts = f"{count_files(done.new)} new, {count_files(done.refused)} refused"
    return Completed(name=done.outcome.capitalize(), message=f"{counts}: {done.reason}", data=done)


def main() -> None:
    """Retrain now. Exit with 1 on failure, else with 0, also without new files or if another run is active."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description=main.__doc__)
    parser.add_argument("landing", help="file, folder or URL where new data files arrive")
    parser.add_argument("--branch", help="branch to commit to (default: the current branch)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="stages to run at once (default: 1)")
    parser.add_argument("--no-push", dest="push", action="store_false", help="do not push to DVC's remote")
    run_now(retrain, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
