"""The stage `sft`: the base model as the reference, and adapters that are merged into it."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.token_table import write_table
from dpo.training.settings import LoraSettings
from tasks import sft as stage
from tasks.common.paths import (
    BASE,
    DEMONSTRATIONS,
    METRICS,
    REFERENCE,
    TOKENS_DEMONSTRATIONS,
    TOKENS_TRAIN,
    TRAIN,
)
from tasks.tracking.provenance import weights
from tests.support.training import make_pairs, make_rows

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml")


@pytest.fixture
def base(tmp_path, monkeypatch, tiny_model_dir) -> Path:
    """A folder with a base model and training pairs; MLflow is off."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir, BASE)
    TRAIN.parent.mkdir()
    pd.DataFrame(make_pairs(12)).to_parquet(TRAIN)
    write_table(TOKENS_TRAIN, TRAIN, load_tokenizer(BASE), PARAMS.engine.max_length)
    monkeypatch.setattr(stage, "reference_run", lambda *_: nullcontext())
    return BASE


def use(monkeypatch, **sft):
    params = dataclasses.replace(PARAMS, sft=dataclasses.replace(PARAMS.sft, learning_rate=1e-2, **sft))
    monkeypatch.setattr(stage, "load_params", lambda: params)


@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_a_loss_of_routers_for_a_model_without_experts_is_an_error_before_training(base, monkeypatch, section):
    changed = dataclasses.replace(getattr(PARAMS, section), router_aux_loss=0.1)
    monkeypatch.setattr(stage, "load_params", lambda: dataclasses.replace(PARAMS, **{section: changed}))
    with pytest.raises(InputError, match="router_aux_loss: a model of type 'llama' has no experts"):
        stage.main()
    assert not REFERENCE.exists()


def test_without_sft_the_reference_is_the_base_model_byte_for_byte(base, monkeypatch):
    monkeypatch.setattr(stage, "load_params", lambda: dataclasses.replace(PARAMS, sft=None))
    stage.main()
    files = {path.name: path for path in REFERENCE.iterdir() if path.name != "provenance.json"}
    assert files.keys() == {path.name for path in base.iterdir()}
    assert all(path.samefile(base / name) for name, path in files.items()), "hard links take no space"
    facts = json.loads((REFERENCE / "provenance.json").read_text())
    assert facts["weights"] == facts["models"][str(BASE)] == weights(BASE)
    assert facts["params"]["sft"] is None
    assert pd.read_csv(METRICS / "sft.csv").columns.tolist() == ["step", "loss"]
    stage.main()
    assert weights(REFERENCE) == weights(BASE)


def test_files_are_copied_if_the_file_system_has_no_hard_links(base, monkeypatch):
    def refuse(*_):
        raise OSError("no links")

    monkeypatch.setattr("dpo.common.files.os.link", refuse)
    monkeypatch.setattr(stage, "load_params", lambda: dataclasses.replace(PARAMS, sft=None))
    stage.main()
    assert weights(REFERENCE) == weights(BASE)


def test_adapters_are_merged_into_the_reference(base, monkeypatch):
    use(monkeypatch, lora=LoraSettings(rank=4, alpha=8), epochs=3)
    stage.main()
    assert sorted(path.name for path in REFERENCE.glob("*.safetensors")) == ["model.safetensors"]
    assert not stage.ADAPTER.exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, REFERENCE))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if "_proj" in name}
    log = pd.read_csv(METRICS / "sft.csv")
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    facts = json.loads((REFERENCE / "provenance.json").read_text())
    assert facts["weights"] == weights(REFERENCE)
    assert facts["params"]["sft"]["lora"]["rank"] == 4


def test_demonstrations_replace_the_training_pairs(base, monkeypatch):
    demonstrations = [pair | {"rejected": None} for pair in make_pairs(10)]
    pd.DataFrame(demonstrations).to_parquet(DEMONSTRATIONS)
    write_table(TOKENS_DEMONSTRATIONS, DEMONSTRATIONS, load_tokenizer(BASE), PARAMS.engine.max_length)
    use(monkeypatch, source="data/own/demonstrations.jsonl", max_pairs=None, pairs_per_step=4)
    trained = []
    monkeypatch.setattr(
        stage,
        "train_sft",
        lambda model, rows, *args, _train=stage.train_sft, **kw: (
            trained.extend(rows) or _train(model, rows, *args, **kw)
        ),
    )
    stage.main()
    assert [len(row.completions) for row in trained] == [1] * 10
    assert len(pd.read_csv(METRICS / "sft.csv")) == 3
    facts = json.loads((REFERENCE / "provenance.json").read_text())
    assert facts["data"].keys() == {str(TRAIN), str(DEMONSTRATIONS)}


def test_the_merged_reference_has_the_log_probs_of_the_trained_adapter(base, monkeypatch):
    use(monkeypatch, lora=LoraSettings(rank=4, alpha=8))
    trained = []
    monkeypatch.setattr(
        stage,
        "train_sft",
        lambda model, *args, _train=stage.train_sft, **kw: trained.append(model) or _train(model, *args, **kw),
    )
    stage.main()
    rows = make_rows(BASE, 6)
    merged, expected = (sequence_logps(model, rows, 500) for model in (load_model(REFERENCE), trained[0]))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-4)
    assert (sequence_logps(load_model(BASE), rows, 500) - expected).abs().max() > 0.1
