"""References other than the default one: the pipeline run by `dvc repro` as a user does."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.engine.pretrained import load_weights
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora
from tests.support.project import TRIAL, change, execute, make_project

LORA = {"rank": 4, "alpha": 8}
SFT = {"learning_rate": 1e-2, "epochs": 1, "pairs_per_step": 8}
DEMONSTRATIONS = "data/own/demonstrations.jsonl"
REFERENCES: dict[str, dict[str, object]] = {
    "demonstrations": {"sft": {**SFT, "lora": LORA, "source": [{"path": DEMONSTRATIONS, "share": 0.5}]}},
    "merge": {"model.base": "models/own/adapter", "model.adapter": "merge", "sft": None, "dpo.lora": LORA},
    "continue": {"model.base": "models/own/adapter", "model.adapter": "continue", "sft": None},
}
"""Settings of the reference."""


def write_sources(folder: Path) -> None:
    """Write 20 demonstrations and an adapter of the base model."""
    rows = [{"prompt": f"Praise film {n}.", "completion": f"Film {n} is splendid."} for n in range(20)]
    (folder / DEMONSTRATIONS).write_text("\n".join(map(json.dumps, rows)))
    model = load_weights(AutoModelForCausalLM, folder / "models/own/tiny")
    add_lora(model, LoraSettings(**LORA))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder / "models/own/adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFERENCES)
def test_the_pipeline_runs_with_each_kind_of_reference(kind, tmp_path, tiny_model_dir):
    folder = make_project(tmp_path / "project", tiny_model_dir)
    write_sources(folder)
    change(folder, REFERENCES[kind])
    execute(folder, "dvc", "repro")
    assert "up to date" in execute(folder, "dvc", "status")
    log = pd.read_csv(folder / f"metrics/train/{TRIAL}.csv")
    assert log["rewards/margins"].iloc[0] == log["rewards/chosen"].iloc[0] == 0.0
    assert log["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-7)
    metrics = json.loads((folder / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert metrics["kl"] > 0
    adapters = {
        name: (folder / f"models/{name}/adapter_model.safetensors").is_file() for name in ("reference", TRIAL)
    }
    assert adapters == {"reference": kind == "continue", TRIAL: kind != "demonstrations"}
    if kind == "demonstrations":
        assert len(pd.read_parquet(folder / "data/demonstrations.parquet")) == 10, "half of the rows"
    execute(folder, "dpo", "merge", f"models/{TRIAL}", str(tmp_path / "merged"), fails=kind == "demonstrations")
    assert (tmp_path / "merged/model.safetensors").is_file() == (kind != "demonstrations")


@pytest.mark.slow
def test_the_base_model_is_the_reference_without_sft(tmp_path, tiny_model_dir):
    folder = make_project(tmp_path / "project", tiny_model_dir)
    change(folder, {"dpo.lora": {"rank": 4, "alpha": 8}})
    execute(folder, "dvc", "config", "cache.type", "hardlink,copy")
    execute(folder, "dvc", "exp", "run", "-S", "sft=null")
    base, reference = (folder / f"models/{name}/model.safetensors" for name in ("base", "reference"))
    assert base.read_bytes() == reference.read_bytes()
    assert reference.samefile(base), "DVC stores the weights once and links both folders to them"
    log = pd.read_csv(folder / f"metrics/train/{TRIAL}.csv")
    assert log["rewards/margins"].iloc[0] == log["rewards/chosen"].iloc[0] == 0.0
    assert log["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-7)
    card = (folder / f"models/{TRIAL}.md").read_text()
    assert "AutoPeftModelForCausalLM" in card
    assert "supervised fine-tuning" not in card
    assert "up to date" in execute(folder, "dvc", "status")
    execute(folder, "dvc", "plots", "show")
    reference.unlink()
    execute(folder, "dvc", "checkout", "models/reference")
    assert base.read_bytes() == reference.read_bytes()
    execute(folder, "dpo", "merge", f"models/{TRIAL}", str(tmp_path / "merged"))
    assert (tmp_path / "merged/model.safetensors").is_file()
    change(folder, {"sft": {"learning_rate": 1e-2, "epochs": 1, "pairs_per_step": 8}})
    execute(folder, "dvc", "repro", "sft")
    assert base.read_bytes() != reference.read_bytes()
