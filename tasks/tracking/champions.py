"""What the gate knows about a champion: its conditions, its training prompts, its weights, its comparisons."""

import hashlib
import json
from collections.abc import Set
from dataclasses import asdict
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from dpo.common.errors import InputError
from dpo.common.files import md5, sha256
from dpo.config import Params
from dpo.data.formats import normalize
from tasks.common import paths
from tasks.tracking.offline import search
from tasks.tracking.provenance import weights
from tasks.tracking.registry import REGISTERED, fix

RUN = "run"
"""Tag of a version: the run that has its training prompts."""
PROMPTS = "gate/train_prompts.txt"
COMPARISON = "dpo.comparison."
"""Start of a run's tag with the number of its comparison; the opponent's version follows."""
CONDITIONS = {
    "base": "base model",
    "tokenizer": "tokenizer",
    "judge": "judge",
    "held_out": "held-out data",
    "prompts": "evaluate.prompts",
    "eval_fraction": "data.eval_fraction",
}
"""Tags of a version: what a comparison depends on. The values are the words in verdicts."""


def conditions(params: Params) -> dict[str, str]:
    """Return what a comparison depends on now, as tags of a version."""
    judges = params.evaluate.judges
    return {
        "base": weights(paths.BASE),
        "tokenizer": sha256(*sorted(paths.REFERENCE.glob("*token*")), *paths.REFERENCE.glob("*.jinja")),
        "judge": json.dumps(asdict(judges[0]), sort_keys=True)[:1000] if judges else "none",
        "held_out": md5(paths.EVAL),
        "prompts": _prompts(params),
        "eval_fraction": str(params.data.eval_fraction),
    }


def _prompts(params: Params) -> str:
    """Return name and hash of the file or folder of separate prompts, `none` without it."""
    name = params.evaluate.prompts
    if name is None:
        return "none"
    files = sorted(Path(name).rglob("*")) if Path(name).is_dir() else [Path(name)]
    return f"{name} {sha256(*(file for file in files if file.is_file()))}"


def changes(params: Params, champion: ModelVersion) -> list[str]:
    """Return a sentence on the conditions that changed since a champion's promotion, if any.

    With a judge, two policies are comparable under any change: both respond now, each with its own tokenizer, to
    prompts that neither was trained on, and today's judge compares them. Without a judge, both must be trained
    from the same base model and share a tokenizer, because rewards are relative to the reference.

    Raises:
        InputError: the champion is not comparable.
    """
    now = conditions(params)
    changed = [name for name in CONDITIONS if champion.tags.get(name, now[name]) != now[name]]
    words = ", ".join(CONDITIONS[name] for name in changed)
    if not params.evaluate.judges and {"base", "tokenizer"} & set(changed):
        raise InputError(
            f"MLflow: version {champion.version} of {REGISTERED} is not comparable: {words} changed since its "
            "promotion, and without a judge, rewards are relative to the reference; add a judge to "
            "evaluate.judges, or start over with `dpo promote --champion none`"
        )
    if not changed:
        return []
    same = (
        "both policies respond now and are judged alike" if params.evaluate.judges else "both rank the same pairs"
    )
    return [f"Changed since version {champion.version}: {words}; the comparison is valid, because {same}."]


def prompt_hash(prompt: str) -> str:
    """Return a hash of a prompt without case and white space, as the data rules compare prompts."""
    return hashlib.sha256(normalize(prompt).encode()).hexdigest()[:16]


def log_prompts(run_id: str) -> None:
    """Log the hashes of the current training prompts with the run of a policy that becomes champion."""
    prompts = pd.read_parquet(paths.TRAIN, columns=["prompt"])["prompt"]
    mlflow.MlflowClient().log_text(run_id, "\n".join(sorted(set(prompts.map(prompt_hash)))), PROMPTS)


def trained_prompts(champion: ModelVersion) -> Set[str]:
    """Return the hashes of the prompts that a champion was trained on.

    Raises:
        InputError: they are not in MLflow, and the training data has changed.
    """
    try:
        return set(mlflow.artifacts.load_text(f"runs:/{champion.tags[RUN]}/{PROMPTS}").split())
    except (KeyError, OSError, mlflow.MlflowException) as error:
        if paths.TRAIN.is_file() and champion.tags.get("data_md5") == md5(paths.TRAIN):
            return set()  # the rules of the validation keep training prompts out of the held-out data
        raise InputError(
            f"MLflow: the training prompts of version {champion.version} of {REGISTERED} are missing ({error}), "
            f"so held-out prompts could be among them; restore the artifact {PROMPTS} from a backup, or "
            f"{fix(broken=str(champion.version))}"
        ) from error


def download(champion: ModelVersion, folder: str) -> Path:
    """Download the weights of a champion. Raise InputError if they are missing."""
    uri = f"models:/{REGISTERED}/{champion.version}"
    try:
        found = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
        if not any(found.glob("model/*.safetensors")):
            raise FileNotFoundError("no model/*.safetensors")
    except (OSError, mlflow.MlflowException) as error:
        raise InputError(
            f"MLflow: the artifacts of {uri}, the champion, are missing ({error}); restore them from a backup, or "
            f"{fix(broken=str(champion.version))}"
        ) from error
    return found


def comparison_number(run_id: str, opponent: str) -> int:
    """Return which comparison with an opponent a run's is, from 1. A repeated gate of the run has the same number.

    The number is a tag of the run, set before the comparison, so that an interrupted gate is not counted twice.
    """
    client, tag = mlflow.MlflowClient(), f"{COMPARISON}{opponent}"
    known = {run.info.run_id: int(run.data.tags[tag]) for run in search(client, f"tags.`{tag}` LIKE '%'")}
    number = known.get(run_id, max(known.values(), default=0) + 1)
    client.set_tag(run_id, tag, str(number))
    return number
