"""The journal of a retraining or a rollback: `.retrain/journal.json` says what runs and how to undo it.

It is written before the first change of the checkout and deleted after the last one. The next retraining or
rollback reads the journal of a run that failed or was killed. A retraining whose gate has not decided is undone:
branch, `dvc.lock`, metrics and outputs return to the state before it. The new files are still in
`.retrain/incoming/`, DVC's run cache has every completed stage, and a training has its checkpoints, so little is
computed again. A decided retraining and a rollback are completed.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from pydantic import TypeAdapter

from dpo.common.errors import InputError
from dpo.common.files import write_json
from flows.git import check_out_data, commit, current_branch, git, restore_files, snapshot
from tasks.tracking.registry import LANDED, VERSIONED

WORK = Path(".retrain")
JOURNAL = WORK / "journal.json"
RESULTS = tuple(path for path in VERSIONED if not path.endswith(".yaml"))
"""The versioned paths that a run changes; settings and stages are changed by people."""


@dataclass(frozen=True)
class Journal:
    """What a run does, and the state of the checkout before it."""

    operation: str
    """`retrain` or `rollback`."""
    branch: str
    """The branch before the run."""
    commit: str
    """The commit before the run."""
    results: str
    """Git's tree of `RESULTS` before the run, with uncommitted changes."""
    files: tuple[str, ...] = ()
    """Names of the new files."""
    messages: tuple[str, ...] = ()
    """Messages of the commits of the run, each recorded before its commit."""
    at_gate: bool = False
    """Whether the gate was started."""
    decision: dict[str, str] | None = None
    """Outcome and reason of the gate, after it has decided."""
    versions: tuple[str, str] | None = None
    """For a rollback: the champion before it and after it."""

    def save(self) -> "Journal":
        """Write the journal atomically."""
        write_json(JOURNAL, asdict(self))
        return self

    def update(self, **values: Any) -> "Journal":
        """Write the journal with other values, and return it."""
        return replace(self, **values).save()

    def undo(self) -> None:
        """Return branch, results and outputs to the state before the run, and delete the journal.

        If there are other commits after those of the run, all are kept, and a new commit has the former results.

        Raises:
            InputError: another branch is checked out.
        """
        if (branch := current_branch()) != self.branch:
            fix = f"`git switch {self.branch}`, then run again"
            raise InputError(
                f"git: a {self.operation} on branch {self.branch} is unfinished, not on {branch}; {fix}"
            )
        get_run_logger().warning("undo the unfinished %s", self.operation)
        ours = {message.strip() for message in self.messages}
        log = git("log", "--format=%B%x00", f"{self.commit}..HEAD").split("\0")
        others = {message.strip() for message in log} - ours - {""}
        if not others and git("rev-list", f"{self.commit}..HEAD"):
            git("reset", "--quiet", "--soft", self.commit)
        restore(self.results, RESULTS, allow_missing=True)
        if others:
            commit(f"Undo the unfinished {self.operation}", *RESULTS)
        close()


def begin(operation: str, **values: Any) -> Journal:
    """Write the journal of a run that starts now."""
    head, results = git("rev-parse", "HEAD"), snapshot(RESULTS)
    return Journal(operation, current_branch(), head, results, **values).save()


def unfinished() -> Journal | None:
    """Return the journal of a run that failed or was killed, or None."""
    if not JOURNAL.exists():
        return None
    return TypeAdapter(Journal).validate_json(JOURNAL.read_text())


def restore(source: str, paths: Sequence[str], *, allow_missing: bool) -> None:
    """Restore versioned files from a commit or a tree, and DVC's data with `check_out_data`."""
    restore_files(source, paths)
    check_out_data(allow_missing=allow_missing)
    if not Path(f"{LANDED}.dvc").exists() and LANDED.exists():
        shutil.rmtree(LANDED)  # DVC does not track it then; copies are in DVC's cache or in `.retrain/incoming/`


def close() -> None:
    """Delete the journal: the run has ended."""
    JOURNAL.unlink(missing_ok=True)
