"""Show the provenance of a checkpoint in `models/TRIAL` or in the MLflow registry (`models:/NAME@ALIAS`)."""

import json
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE
from tasks.common.flatten import flatten
from tasks.tracking.provenance import weights


def show(checkpoint: str, as_json: bool) -> None:
    """Print the provenance of a checkpoint's folder or of a model URI of MLflow."""
    facts = of_version(checkpoint) if checkpoint.startswith("models:/") else of_folder(Path(checkpoint))
    rows = [f"{'.'.join(path):<34} {value}" for path, value in flatten(facts)]
    print(json.dumps(facts, indent=2) if as_json else "\n".join(rows))


def of_folder(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's provenance. Raise InputError if the file cannot be read or has other weights."""
    try:
        facts: dict[str, Any] = json.loads((folder / PROVENANCE).read_text())
        recorded = facts["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: {PROVENANCE} cannot be read ({error}); name the folder of a checkpoint of this pipeline"
        ) from error
    if weights(folder) != recorded:
        raise InputError(
            f"{folder}: the weights differ from those of {PROVENANCE} (SHA-256 {recorded}); restore the "
            "checkpoint with `dvc checkout` or `dvc pull`"
        )
    return facts


def of_version(uri: str) -> dict[str, Any]:
    """Return the provenance that MLflow stores with a model. Raise InputError if there is none."""
    import mlflow

    from tasks.tracking.offline import connect

    connect()
    try:
        metadata = mlflow.models.get_model_info(uri).metadata or {}
        return json.loads(metadata["provenance"])
    except (mlflow.MlflowException, OSError, KeyError) as error:
        raise InputError(f"{uri}: MLflow has no such model with a provenance: {error}") from error
