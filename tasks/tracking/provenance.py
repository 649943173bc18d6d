"""Provenance of results: code, data, models, settings, packages, machine, runs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo.common.files import md5, sha256
from dpo.config import Params
from dpo.training.settings import Trial
from tasks.common.git import head_commit, inputs_changed
from tasks.common.paths import BASE, DEMONSTRATIONS, EVAL, REFERENCE, TRAIN

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "dvc", "mlflow", "prefect")
FLOW_RUN = "DPO_PREFECT_FLOW_RUN"
"""Environment variable in which a flow passes its run id to its stages."""


def weights(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights."""
    return sha256(*sorted(folder.glob("*.safetensors")))


def packages() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def made_by(params: Params, mlflow_run: str | None, trial: Trial | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint's provenance file. Without a trial, the checkpoint is the reference."""
    groups = {"engine": params.engine, "model": params.model, "data": params.data, "sft": params.sft}
    settings = {"seed": params.seed} | {name: group and asdict(group) for name, group in groups.items()}
    if trial is not None:
        settings |= {"loss": asdict(trial.loss), "dpo": asdict(params.dpo), "trial": trial.settings}
    return {
        "git_commit": head_commit(),
        "git_changes_since": inputs_changed(),
        "data": {str(path): md5(path) for path in ([TRAIN, DEMONSTRATIONS] if params.demonstrations else [TRAIN])},
        "models": {str(folder): weights(folder) for folder in ([BASE] if trial is None else [BASE, REFERENCE])},
        "params": settings,
        "packages": packages(),
        "machine": machine(),
        "mlflow_run": mlflow_run,
        "prefect_flow_run": os.environ.get(FLOW_RUN),
    }


def machine() -> dict[str, str]:
    """Return the operating system and the processors."""
    import torch  # imported here because commands that only hash weights start faster without it

    processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        processor += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {"system": platform.platform(), "processor": processor}


def provenance(checkpoints: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Return the provenance of checkpoints of this project for the report, as tables by title."""
    return {
        "code": {"git commit": head_commit() + (" with uncommitted changes" if inputs_changed() else "")},
        "data (MD5, as in dvc.lock)": {str(path): md5(path) for path in (TRAIN, EVAL)},
        "weights (SHA-256)": {str(path): weights(path) for path in (BASE, *checkpoints)},
        "packages": packages(),
        "machine": machine(),
    }
