"""The champion, which is the version of MLflow's registered model that is served, and its predecessors.

Every version that became champion has tags for the number of its predecessor and for the commit of its files, so
that a rollback needs nothing but the registry.
"""

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
"""The latest decision of the promotion gate as JSON; `gate.md` has the same for people."""
LANDED = Path("data/own/landed")
"""The folder to which retraining moves new data files."""
VERSIONED = ("params.yaml", "dvc.yaml", "dvc.lock", f"{LANDED}.dvc", str(LANDED.parent / ".gitignore"), "metrics")
"""Paths that git versions: settings, stages, hashes of data and results, metrics."""


def champion() -> ModelVersion | None:
    """Return the current champion, or None before the first promotion."""
    found = mlflow.MlflowClient().search_registered_models(f"name = '{REGISTERED}'")
    number = found[0].aliases.get(CHAMPION) if found else None
    return None if number is None else version(number)


def version(number: str) -> ModelVersion:
    """Return a version by its number."""
    return mlflow.MlflowClient().get_model_version(REGISTERED, str(number))


def promote(model_id: str, tags: dict[str, str]) -> ModelVersion:
    """Make a logged model the champion and record the previous champion as its predecessor.

    The version that an interrupted promotion registered is reused. A model that was champion before gets a new
    version, so that the tags of the old version stay as they are. A rollback restores the commit in `git_commit`.
    """
    client, before = mlflow.MlflowClient(), champion()
    previous = str(before.version) if before else "none"
    found = client.search_model_versions(f"name = '{REGISTERED}'")
    unused = [v for v in found if v.source == f"models:/{model_id}" and PROMOTED_AT not in v.tags]
    new = unused[0] if unused else mlflow.register_model(f"models:/{model_id}", REGISTERED)
    for name, value in (tags | {PREDECESSOR: previous}).items():
        client.set_model_version_tag(REGISTERED, new.version, name, value)
    _point(new.version, previous)
    client.set_model_version_tag(REGISTERED, new.version, PROMOTED_AT, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    return version(new.version)


def predecessor() -> tuple[ModelVersion, ModelVersion]:
    """Return the champion and its predecessor. Raise InputError if there is no champion or no predecessor."""
    now = champion()
    if now is None:
        raise InputError(f"MLflow: {REGISTERED} has no {CHAMPION}; `dpo promote` promotes the selected policy")
    number = now.tags.get(PREDECESSOR, "none")
    if number == "none":
        raise InputError(
            f"MLflow: version {now.version} of {REGISTERED} is the first {CHAMPION} and has no predecessor"
        )
    return now, version(number)


def roll_back(to: ModelVersion) -> None:
    """Make an earlier champion the champion again."""
    _point(to.version, to.tags.get(PREDECESSOR, "none"))


def _point(number: str, previous: str) -> None:
    client = mlflow.MlflowClient()
    if previous == "none":
        client.delete_registered_model_alias(REGISTERED, PREVIOUS)
    else:
        client.set_registered_model_alias(REGISTERED, PREVIOUS, previous)
    client.set_registered_model_alias(REGISTERED, CHAMPION, number)  # last: if interrupted before, repeat all
