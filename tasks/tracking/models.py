"""Checkpoints as MLflow models for `mlflow models serve`."""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow

from dpo.common.files import PROVENANCE
from dpo.config import Params
from dpo.engine.base_model import load_checkpoint
from dpo.engine.pretrained import load_tokenizer
from tasks.common.paths import REFERENCE
from tasks.tracking import offline, runs
from tasks.tracking.provenance import weights

log = logging.getLogger(__name__)
logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it warns about every model without a licence


def log_models(params: Params, folders: list[Path]) -> None:
    """Log checkpoints as MLflow models in the runs that made them, unless they are logged already."""
    if not offline.connect_or_offline():
        log.warning("MLflow is unreachable: models are not logged; log them later with `dvc repro -f -s compare`")
        return
    packages = ("mlflow", "torch", "transformers", "accelerate")
    for folder in folders:
        made, logged = runs.run_of(folder), f"dpo.logged.{weights(folder)[:16]}"
        run = mlflow.get_run(runs.sweep_run(params) if made is None else made.info.run_id)
        if logged in run.data.tags:
            continue
        tokenizer, model = load_tokenizer(folder), load_checkpoint(folder)
        model.name_or_path = f"./{folder}"  # a path, so that MLflow does not query the hub for a licence
        chat = bool(tokenizer.chat_template)
        example: Any = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
        with mlflow.start_run(run_id=run.info.run_id):
            mlflow.transformers.log_model(
                {"model": model, "tokenizer": tokenizer},
                name="reference" if folder == REFERENCE else "policy",
                task=f"llm/v1/{'chat' if chat else 'completions'}",
                metadata={"provenance": (folder / PROVENANCE).read_text()},
                input_example={**example, "max_tokens": 16},
                pip_requirements=[f"{name}=={version(name)}" for name in packages],
            )
            mlflow.set_tag(logged, "true")
        mlflow.MlflowClient().set_terminated(run.info.run_id, run.info.status, run.info.end_time)  # as before
