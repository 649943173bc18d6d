"""The champion, which is the version of MLflow's registered model that is served, and its predecessors.

Every version that became champion has tags for the number of its predecessor and for the commit of its files, so
that a rollback needs nothing but the registry. The registered model's tag `dpo.champion` names the version to
which this module points the alias, so that a change by hand is detected.
"""

from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from dpo.common.errors import InputError
from tasks.common.paths import REPORTS
from tasks.tracking.offline import search

REGISTERED = "dpo-policy"
CHAMPION, PREVIOUS = "champion", "previous"
PREDECESSOR, COMMIT, PROMOTED_AT = "predecessor", "git_commit", "promoted_at"
PAIRS = "train_pairs"
"""Tag of a version: the number of pairs that it was trained on."""
POINTER = "dpo.champion"
"""Tag of the registered model: the version of the alias `champion`. While the alias moves, the old and new one."""
DECISION = "dpo.gate"
"""Tag of a policy's run and of its sweep: `promoted` or `kept`."""
REASON = "dpo.gate_reason"
GATE = REPORTS / "gate.json"
"""The latest decision of the promotion gate as JSON; `gate.md` has the same for people."""
LANDED = Path("data/own/landed")
"""The folder to which retraining moves new data files."""
VERSIONED = ("params.yaml", "dvc.yaml", "dvc.lock", f"{LANDED}.dvc", str(LANDED.parent / ".gitignore"), "metrics")
"""Paths that git versions: settings, stages, hashes of data and results, metrics."""


def champion() -> ModelVersion | None:
    """Return the current champion, or None before the first promotion.

    Raises:
        InputError: the registry was changed by hand.
    """
    model = _registered()
    if model is None:
        if search(mlflow.MlflowClient(), f"tags.`{DECISION}` = 'promoted'"):
            raise InputError(f"MLflow: {REGISTERED} was deleted after a promotion; restore the store, or {fix()}")
        return None
    pointer = model.tags.get(POINTER, "").split()
    alias = str(model.aliases.get(CHAMPION, "none"))
    if not pointer and alias == "none" and _promoted():
        raise InputError(f"MLflow: {REGISTERED} has no {CHAMPION}, but had one; {fix()}")
    if pointer and alias not in pointer:
        what = f"has no {CHAMPION}" if alias == "none" else f"has version {alias} as {CHAMPION}"
        raise InputError(
            f"MLflow: {REGISTERED} {what}, but version {pointer[0]} was promoted: the alias was changed, or the "
            f"version was deleted, outside of this project; {fix(pointer[0])}"
        )
    return None if alias == "none" else version(alias)


def version(number: str) -> ModelVersion:
    """Return a version that was champion. Raise InputError if it is deleted or has no tags of a promotion."""
    try:
        found = mlflow.MlflowClient().get_model_version(REGISTERED, str(number))
    except mlflow.MlflowException as error:
        raise InputError(
            f"MLflow: version {number} of {REGISTERED} does not exist; {fix(broken=str(number))}"
        ) from error
    missing = [tag for tag in (COMMIT, PREDECESSOR) if tag not in found.tags]
    if missing:
        raise InputError(
            f"MLflow: version {number} of {REGISTERED} has no tag {' or '.join(missing)}, which a promotion sets; "
            f"{fix(broken=str(number))}"
        )
    return found


def fix(number: str = "none", *, broken: str = "none") -> str:
    """Return how to set the champion: to `number`, if it can be used, else to another that is not broken."""
    usable = [each for each in _promoted() if each != broken]
    if number in usable:
        return f"restore it with `dpo promote --champion {number}`"
    others = f"`dpo promote --champion {usable[-1]}`, an earlier champion, or " if usable else ""
    return f"set the champion with {others}`dpo promote --champion none`, which starts over"


def _promoted() -> list[str]:
    """Return the versions with all tags of a promotion, oldest first."""
    if _registered() is None:
        return []
    found = mlflow.MlflowClient().search_model_versions(f"name = '{REGISTERED}'")
    needed = {COMMIT, PREDECESSOR, PROMOTED_AT}
    return sorted((str(each.version) for each in found if needed <= set(each.tags)), key=int)


def _registered() -> RegisteredModel | None:
    return next(iter(mlflow.MlflowClient().search_registered_models(f"name = '{REGISTERED}'")), None)


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
    _point(str(new.version), previous)
    client.set_model_version_tag(REGISTERED, new.version, PROMOTED_AT, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    return version(str(new.version))


def predecessor() -> tuple[ModelVersion, ModelVersion]:
    """Return the champion and its predecessor. Raise InputError if there is no champion or no predecessor."""
    now = champion()
    if now is None:
        raise InputError(f"MLflow: {REGISTERED} has no {CHAMPION}; `dpo promote` promotes the selected policy")
    number = now.tags[PREDECESSOR]
    if number == "none":
        raise InputError(
            f"MLflow: version {now.version} of {REGISTERED} is the first {CHAMPION} and has no predecessor"
        )
    return now, version(number)


def roll_back(to: ModelVersion) -> None:
    """Make an earlier champion the champion again."""
    _point(str(to.version), to.tags[PREDECESSOR])


def set_champion(number: str) -> None:
    """Repair the registry: make a version that was promoted the champion, or start over with `none`.

    Raises:
        InputError: the version does not exist or was never promoted.
    """
    if number != "none":
        roll_back(version(number))
        return
    client = mlflow.MlflowClient()
    if _registered() is None:
        client.create_registered_model(REGISTERED)
    for alias in (CHAMPION, PREVIOUS):
        client.delete_registered_model_alias(REGISTERED, alias)
    client.set_registered_model_tag(REGISTERED, POINTER, "none")


def _point(number: str, previous: str) -> None:
    client, model = mlflow.MlflowClient(), _registered()
    current = str(model.aliases.get(CHAMPION, "none")) if model else "none"
    client.set_registered_model_tag(REGISTERED, POINTER, f"{current} {number}")
    if previous == "none":
        client.delete_registered_model_alias(REGISTERED, PREVIOUS)
    else:
        client.set_registered_model_alias(REGISTERED, PREVIOUS, previous)
    client.set_registered_model_alias(REGISTERED, CHAMPION, number)  # if interrupted before, repeat all
    client.set_registered_model_tag(REGISTERED, POINTER, number)
