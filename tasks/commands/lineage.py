"""Show what produced a checkpoint in `models/TRIAL` or in the MLflow registry (`models:/NAME@ALIAS`)."""

import argparse
import json
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE
from tasks.common.runner import run
from tasks.tracking.provenance import weights


def main() -> None:
    """Read, check, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.commands.lineage", description="Tell what made a checkpoint."
    )
    parser.add_argument("checkpoint", help="a checkpoint's folder, or models:/NAME/VERSION, models:/NAME@ALIAS")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args()
    name = given.checkpoint
    facts = of_version(name) if name.startswith("models:/") else of_folder(Path(name))
    if given.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in flat(facts):
        print(f"{name:<34} {value}")


def of_folder(folder: Path) -> dict[str, Any]:
    """What the provenance file inside a checkpoint tells, whose weights must be those it was written with."""
    try:
        facts: dict[str, Any] = json.loads((folder / PROVENANCE).read_text())
        recorded = facts["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: no {PROVENANCE} to read ({error}); is it a checkpoint of a pipeline?"
        ) from error
    if weights(folder) != recorded:
        raise InputError(
            f"{folder}: the weights are not those that {PROVENANCE} was written with (SHA-256 {recorded}); bring "
            "the checkpoint anew, by `dvc checkout` or `dvc pull`"
        )
    return facts


def check_base(adapter: Path, facts: dict[str, Any]) -> None:
    """Refuse an adapter whose base is not the model it was trained on, as `facts` of `of_folder` tell."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    recorded = facts.get("models", {}).get(base)
    if recorded is not None and weights(Path(base)) != recorded:
        raise InputError(
            f"{adapter}: was trained on other weights than those now in {base} (SHA-256 {recorded}); bring both "
            "as they were in one commit, by `git checkout` and `dvc checkout`"
        )


def of_version(uri: str) -> dict[str, Any]:
    """What MLflow keeps with a model of its registry."""
    import mlflow

    from tasks.tracking.offline import connect

    connect()
    try:
        metadata = mlflow.models.get_model_info(uri).metadata or {}
        facts: dict[str, Any] = json.loads(metadata["provenance"])
    except (mlflow.MlflowException, KeyError) as error:
        raise InputError(f"{uri}: no model with a provenance in MLflow here: {error}") from error
    return facts


def flat(facts: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Facts at any depth, each with its path, as `params.seed`."""
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += flat(value, f"{above}{name}.") if isinstance(value, dict) else [(above + name, value)]
    return rows


if __name__ == "__main__":
    run(main)
