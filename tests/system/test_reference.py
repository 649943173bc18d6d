"""References other than the default one: the pipeline run by `dvc repro` as a user does."""

import math

import pandas as pd
import pytest

from tests.support.project import TRIAL, change, execute, make_project


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
