"""Retrain on new data files: `python -m flows.retrain LANDING [--branch NAME] [--parallel N] [--no-push]`.

New files become a new version of the data, the pipeline runs, and the gate decides whether to promote the
selected policy. Without new files, nothing changes. A run that fails restores the state before it; one that is
killed is undone or completed by the next run (`flows.journal`).
"""

import argparse
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import PositiveInt

from dpo.common.errors import InputError, TransientError
from dpo.config import load_params
from flows.artifacts import artifact_key, failure_page, ignore_outage
from flows.git import commit, current_branch, default_remote, dvc, git
from flows.journal import RESULTS, Journal, begin, close
from flows.landing import (
    HASH_LENGTH,
    INCOMING,
    Checked,
    check_files,
    count_files,
    fetch_new,
    take_in,
)
from flows.pipeline import RETRIES, bring_up_to_date, name_flow_run, pipeline, read_graph, run_now
from flows.processes import StageError, run_module
from flows.recovery import recover_now, run_exclusively
from flows.sweep import restore_settings
from tasks.common.addresses import refuse_credentials, shown
from tasks.common.git import uncommitted
from tasks.common.markdown import inline
from tasks.tracking.registry import GATE, LANDED

SHOWN_FILES = 50
"""Number of files that events and artifacts name."""


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining: `promoted`, `kept` or `refused`, the added files, and why files were refused."""

    outcome: str
    reason: str
    new: tuple[str, ...]
    refused: dict[str, str]
    repeated: int = 0
    """Number of rows in new files that the data had already; they were dropped."""
    details: str = ""
    """For a promotion, what was promoted, as Markdown."""


@flow(name="retrain", flow_run_name=name_flow_run)
def retrain(
    landing: str, branch: str | None = None, parallel: PositiveInt = 1, push: bool = True
) -> State[Retrained]:
    """Take in new files, bring the pipeline up to date, and promote the policy if the gate allows it.

    Returns the state Promoted, Kept or Refused with a `Retrained`, NothingNew, AlreadyRunning or Cancelled. Raises
    InputError if the project is not ready, StageError or TransientError if a step fails; all is then as before.

    Args:
        landing: a file or a folder, or the URL of one, such as s3://bucket/folder; an http URL must name a file.
        branch: where to commit; created from the current branch if it does not exist. Default: the current branch.
        parallel: stages to run at once.
        push: send new data and results to DVC's default remote, if there is one.
    """
    with failure_page("Retraining"):
        return run_exclusively(lambda done: _retrain(landing, branch, parallel, push, done))


def _retrain(
    landing: str, branch: str | None, parallel: int, push: bool, done: Journal | None
) -> State[Retrained]:
    refuse_credentials("landing", landing)
    arrived, finished = fetch_new(landing), None
    if done and done.decision:
        finished = finish(done, push, may_fail=bool(arrived.files))
        if not arrived.files:
            return finished
    if not arrived.files:
        if arrived.refused:
            notify("refused", {"files": first_of(arrived.refused)})
        return nothing_to_add(landing, arrived.refused, 0)
    check_project(branch)
    check_gate()
    journal = begin("retrain")
    try:
        model_changed = update_model()
        checked = check_files(arrived.files)
        if refused := arrived.refused | checked.refused:
            notify("refused", {"files": first_of(refused)})
        if not checked.new:
            journal.undo() if model_changed else close()
            nothing_new = nothing_to_add(landing, refused, checked.repeated_rows)
            return nothing_new if refused or finished is None else finished
        journal = decide(journal, checked, parallel)
    except BaseException:  # also SIGTERM
        recover_now()
        raise
    return finish(journal, push, refused, checked.repeated_rows)


def decide(journal: Journal, checked: Checked, parallel: int) -> Journal:
    """Commit the new data, run the pipeline, commit its results and run the gate."""
    files = tuple(checked.new)
    journal = take_in(journal.update(files=files), checked.new)
    pipeline(parallel)
    message = "\n".join([f"Retrain on {count_files(files)}", "", *files])
    journal = journal.update(messages=(*journal.messages, message))
    commit_results(message)
    journal = journal.update(at_gate=True)
    decision = run_gate()
    journal = journal.update(decision=decision)
    notify(decision["outcome"], {"reason": decision["reason"], "files": first_of(files)})
    return journal


def finish(
    journal: Journal, push: bool, refused: dict[str, str] | None = None, repeated: int = 0, may_fail: bool = False
) -> State[Retrained]:
    """Push the results of a decided retraining, and report it. If `may_fail`, a failed push is only logged."""
    assert journal.decision is not None
    for path in INCOMING.glob("*"):
        if path.name[:HASH_LENGTH] in {name[:HASH_LENGTH] for name in journal.files}:
            path.unlink()
    if push:
        try:
            push_results()
        except TransientError as error:
            if not may_fail:
                raise
            get_run_logger().error("not pushed; `dvc push --all-commits` sends it later: %s", error)
    close()
    return report(Retrained(**journal.decision, new=journal.files, refused=refused or {}, repeated=repeated))


def nothing_to_add(landing: str, refused: dict[str, str], repeated: int) -> State[Any]:
    """Return the state of a run without new rows."""
    if refused:
        return report(Retrained("refused", "No new file is valid: the data is unchanged.", (), refused, repeated))
    message = f"{shown(landing)} has no new file"
    if repeated:
        message += f" with new rows; the data has all {repeated} rows of the files already"
    return Completed(name="NothingNew", message=message)


def update_model() -> bool:
    """Run the stage that fetches the base model if it is stale, because the check uses the model's tokenizer."""
    stage = "fetch_model"
    if stage not in read_graph()[1]:
        return False
    bring_up_to_date(stage, threading.Event(), stale=True, slots=threading.Semaphore())
    return True


@task(name="check project", cache_policy=NO_CACHE)
def check_project(branch: str | None) -> None:
    """Switch to a new branch, if that is requested.

    Raises:
        InputError: the project cannot take in new files, HEAD is detached, or another branch is checked out.
        StageError: git has no committer identity.
    """
    data = load_params().data
    if not any(source.path and Path(source.path) in (LANDED, LANDED.parent) for source in data.sources):
        raise InputError(
            f"params.yaml: data.source: {data.origin!r} does not contain {LANDED}, the folder of new files; add "
            f"it, for example data.source: [data/own/pairs.jsonl, {LANDED}]"
        )
    restore_settings()
    if changed := [path for path in uncommitted() if not path.startswith(RESULTS)]:
        fix = "commit them first, so that the results belong to a commit"
        raise InputError(f"git: uncommitted changes in {', '.join(changed)}; {fix}")
    git("var", "GIT_COMMITTER_IDENT")
    now = current_branch()
    if branch is not None and now != branch:
        if git("branch", "--list", branch):
            fix = f"`git switch {branch}`, or a clone of its own for each branch"
            raise InputError(f"git: the checkout is on branch {now}, the retraining commits to {branch}; {fix}")
        git("switch", "--quiet", "--create", branch)


@task(name="check gate", cache_policy=NO_CACHE)
def check_gate() -> None:
    """Stop if MLflow's registry was changed by hand; report if the held-out prompts are too few to promote."""
    run_module("tasks.commands.cli", "promote", "--check")


@task(name="commit results", cache_policy=NO_CACHE)
def commit_results(message: str) -> None:
    """Commit the results of the pipeline: the hashes of its outputs, and its metrics."""
    commit(message, "dvc.lock", "metrics")


@task(name="promotion gate", cache_policy=NO_CACHE)
def run_gate() -> dict[str, str]:
    """Promote the selected policy if it is better than the champion; return the outcome and the reason."""
    run_module("tasks.commands.cli", "promote")
    with ignore_outage():
        create_markdown_artifact(GATE.with_suffix(".md").read_text(), key=artifact_key("gate"))
    verdict = json.loads(GATE.read_text())
    outcome = "promoted" if verdict["promoted"] else "kept"
    return {"outcome": outcome, "reason": verdict["reason"], "details": verdict["details"]}


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


def first_of(names: Iterable[str] | dict[str, str]) -> Any:
    """Return at most `SHOWN_FILES` names, or names with reasons: events and artifacts have a limited size."""
    if isinstance(names, dict):
        return dict(islice(names.items(), SHOWN_FILES))
    return list(islice(names, SHOWN_FILES))


def report(done: Retrained) -> State[Retrained]:
    """Publish the result as an artifact and return it as a state."""
    counts = f"{count_files(done.new)} new, {count_files(done.refused)} refused"
    counts += f", {done.repeated} rows in the data already" if done.repeated else ""
    lines = [f"## Retraining: {done.outcome}", "", inline(done.reason), "", done.details, "", f"{counts}.", ""]
    lines += [f"- new: {inline(name)}" for name in first_of(done.new)]
    lines += [f"- refused: {inline(name)}: {inline(reason)}" for name, reason in first_of(done.refused).items()]
    if max(len(done.new), len(done.refused)) > SHOWN_FILES:
        lines.append(f"- and more; the list has at most {SHOWN_FILES} of each")
    with ignore_outage():
        create_markdown_artifact("\n".join([*lines, ""]), key=artifact_key("retrain"))
    message = f"{counts}: {done.reason}"
    if done.outcome == "refused":
        return Failed(name="Refused", message=message, data=done)
    return Completed(name=done.outcome.capitalize(), message=message, data=done)


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
