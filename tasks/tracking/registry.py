"""The champion: the version of MLflow's registered model that serves, and the versions that served before it.

Each version that became champion carries its predecessor's number and the commit whose files it was made from, so
that the way back is known without any memory but the registry's own.
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from dpo.common.errors import InputError
from tasks.common.paths import REPORTS

REGISTERED = "dpo-policy"
CHAMPION, PREVIOUS = "champion", "previous"
PREDECESSOR, COMMIT, PROMOTED_AT = "predecessor", "git_commit", "promoted_at"
GATE = REPORTS / "gate.json"
"""What the gate decided last, for programs; people read the page beside it."""
LANDED = Path("data/own/landed")
"""The folder of data files that a retraining takes in."""
VERSIONED = ("params.yaml", "dvc.yaml", "dvc.lock", f"{LANDED}.dvc", str(LANDED.parent / ".gitignore"), "metrics")
"""What git holds of a version: settings, stages, the hashes of data and results, figures."""


def champion() -> ModelVersion | None:
    """The version that serves now, None before the first promotion."""
    found = mlflow.MlflowClient().search_registered_models(f"name = '{REGISTERED}'")
    number = found[0].aliases.get(CHAMPION) if found else None
    return None if number is None else version(number)


def version(number: str) -> ModelVersion:
    """A version by its number."""
    return mlflow.MlflowClient().get_model_version(REGISTERED, str(number))


def promote(model_id: str, tags: dict[str, str]) -> ModelVersion:
    """Make a logged model the champion; the one until now becomes its predecessor.

    A version that an interrupted promotion left is used again; one that was champion before keeps its own history.

    Args:
        model_id: MLflow's id of the logged model.
        tags: of the version; `git_commit` is the commit to which a rollback returns.
    """
    client, before = mlflow.MlflowClient(), champion()
    found = client.search_model_versions(f"name = '{REGISTERED}'")
    unused = [v for v in found if v.source == f"models:/{model_id}" and PROMOTED_AT not in v.tags]
    new = unused[0] if unused else mlflow.register_model(f"models:/{model_id}", REGISTERED)
    for name, value in (tags | {PREDECESSOR: before.version if before else "none"}).items():
        client.set_model_version_tag(REGISTERED, new.version, name, str(value))
    _point(new.version, before.version if before else None)
    client.set_model_version_tag(REGISTERED, new.version, PROMOTED_AT, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    return version(new.version)


def predecessor() -> tuple[ModelVersion, ModelVersion]:
    """The champion and the version that it took the place of.

    Raises:
        InputError: there is no champion, or none before it.
    """
    now = champion()
    if now is None:
        raise InputError(
            f"MLflow: {REGISTERED} has no {CHAMPION}; `python -m tasks.commands.promote` makes the first"
        )
    number = now.tags.get(PREDECESSOR, "none")
    if number == "none":
        raise InputError(
            f"MLflow: version {now.version} of {REGISTERED} is the first {CHAMPION}: none came before"
        )
    return now, version(number)


def roll_back(to: ModelVersion) -> None:
    """Make an earlier champion the champion again."""
    earlier = to.tags.get(PREDECESSOR, "none")
    _point(to.version, None if earlier == "none" else earlier)


def uncommitted(*paths: str) -> list[str]:
    """Files under these paths, all by default, that differ from git's last commit; new files only under paths.

    Raises:
        InputError: this folder is in no git repository with a commit.
    """
    untracked = "all" if paths else "no"
    command = ["git", "status", "--porcelain", f"--untracked-files={untracked}", "--", *paths]
    commit = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if commit.returncode or done.returncode:
        raise InputError("git: no commit here; a version is found again by its commit: `git init`, then commit")
    return [line[3:] for line in done.stdout.splitlines()]


def _point(number: str, previous: str | None) -> None:
    client = mlflow.MlflowClient()
    if previous is None:
        client.delete_registered_model_alias(REGISTERED, PREVIOUS)
    else:
        client.set_registered_model_alias(REGISTERED, PREVIOUS, previous)
    client.set_registered_model_alias(REGISTERED, CHAMPION, number)  # last: until then all can be done again
