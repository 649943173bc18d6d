"""What made a result: code, data, models, settings, packages, machine, runs."""

import dataclasses
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo.common.files import md5, sha256
from dpo.config import Params
from dpo.training.settings import Trial
from tasks.common.paths import BASE, EVAL, REFERENCE, TRAIN

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "dvc", "mlflow", "prefect")
RESULTS = (":!dvc.lock", ":!metrics", ":!*.gitignore")
"""What the pipeline itself changes while it runs, as git leaves it out."""

FLOW_RUN = "DPO_PREFECT_FLOW_RUN"
"""Environment variable by which a flow tells its stages the id of its run."""


def commit() -> tuple[str, bool]:
    """Git's commit (`none` outside a repository) and whether tracked files differ from it, results aside."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *RESULTS)
    return git("rev-parse", "HEAD") or "none", bool(changed)


def weights(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    return sha256(*sorted(folder.glob("*.safetensors")))


def packages() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def made_by(params: Params, mlflow_run: str | None, trial: Trial | None = None) -> dict[str, Any]:
    """Facts for the provenance file of a checkpoint: of a trial's policy, or of the reference."""
    revision, dirty = commit()
    settings: dict[str, Any] = {"engine": params.engine, "model": params.model}
    settings |= {"data": params.data, "sft": params.sft}
    if trial is not None:
        settings |= {"trial": trial, "loss": getattr(params.losses, trial.loss), "dpo": params.dpo}
    return {
        "git_commit": revision,
        "git_changes_since": dirty,
        "data": {str(TRAIN): md5(TRAIN)},
        "models": {str(folder): weights(folder) for folder in ([BASE] if trial is None else [BASE, REFERENCE])},
        "params": {"seed": params.seed} | {name: dataclasses.asdict(group) for name, group in settings.items()},
        "packages": packages(),
        "machine": machine(),
        "mlflow_run": mlflow_run,
        "prefect_flow_run": os.environ.get(FLOW_RUN),
    }


def machine() -> dict[str, str]:
    """System and processors."""
    import torch  # here, so that stages which only ask for the commit start without it

    processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        processor += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {"system": platform.platform(), "processor": processor}


def provenance(checkpoints: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Groups of facts about checkpoints trained here, ready to be shown."""
    revision, dirty = commit()
    return {
        "code": {"git commit": revision + (" and changes since" if dirty else "")},
        "data (MD5, as in dvc.lock)": {str(path): md5(path) for path in (TRAIN, EVAL)},
        "weights (SHA-256)": {str(path): weights(path) for path in (BASE, *checkpoints)},
        "packages": packages(),
        "machine": machine(),
    }
