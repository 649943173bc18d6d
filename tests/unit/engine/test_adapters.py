"""LoRA adapters as the base model: merged, continued, refused; and loading an adapter after a move."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine import base_model
from dpo.engine.base_model import load_base, load_checkpoint, save_base
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.pretrained import adapter_base, load_causal_lm, load_weights
from dpo.engine.settings import ModelSettings
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora, save_checkpoint, train_dpo
from tests.support.models import chat_tokenizer, make_model
from tests.support.training import dpo_params, make_rows, trial

ADAPTER = "models/own/adapter"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project folder with a base model with an untied head, and an adapter, both under models/own."""
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    sizes = {"vocab_size": len(tokenizer) + 8, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    base = make_model("qwen2", Path("models/own/base"), max_position_embeddings=512, pad_token_id=None, **sizes)
    tokenizer.save_pretrained(base)
    model = load_weights(AutoModelForCausalLM, base)
    add_lora(model, LoraSettings(rank=4, alpha=8))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(ADAPTER)
    return tmp_path


def settings(base=ADAPTER, **changes):
    return ModelSettings(base=base, **changes)


def fetched(adapter):
    """Do what the stage `fetch_model` does."""
    model, tokenizer = load_base(settings(adapter=adapter))
    save_base(model, tokenizer, Path("models/base"))
    return Path("models/base")


def logps(path, rows):
    return sequence_logps(load_model(Path(path)), rows, 500)


@pytest.fixture
def rows(folder):
    return make_rows("models/own/base", 6)


@pytest.fixture
def expected(rows):
    """Log-probs of base and adapter, as peft computes them."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(ADAPTER, dtype=torch.float32).merge_and_unload()
    model.save_pretrained("peft")
    return logps("peft", rows)


def test_merge_writes_a_plain_model_with_the_log_probs_of_base_and_adapter(rows, expected):
    base = fetched("merge")
    assert sorted(path.name for path in base.glob("*.safetensors")) == ["model.safetensors"]
    assert not (base / "adapter_config.json").exists()
    assert json.loads((base / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    torch.testing.assert_close(logps(base, rows), expected, rtol=1e-5, atol=1e-4)
    assert (logps("models/own/base", rows) - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(base).chat_template == chat_tokenizer().chat_template


def test_continue_keeps_base_and_adapter_and_trains_the_adapter_from_margin_zero(rows, expected):
    base = fetched("continue")
    assert sorted(path.name for path in base.glob("*.safetensors")) == [
        "adapter_model.safetensors",
        "model.safetensors",
    ]
    own, copy = (load_weights(AutoModelForCausalLM, path).state_dict() for path in ("models/own/base", base))
    assert all(
        torch.equal(copy.get(name, copy.get(name.replace("proj.", "proj.base_layer."))), own[name]) for name in own
    )
    reference = shutil.copytree(base, "models/reference")
    torch.testing.assert_close(logps(reference, rows), expected, rtol=1e-5, atol=1e-4)

    model = load_model(Path("models/reference"))
    cached = dict(zip((row.id for row in rows), sequence_logps(model, rows, 500).tolist(), strict=True))
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    log = train_dpo(model, rows, cached, dpo_params(), trial(learning_rate=1e-2), max_tokens_per_microbatch=500)
    assert log[0]["rewards/margins"] == 0.0
    changed = {name for name, weight in model.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}

    policy = Path("models/policy")
    save_checkpoint(model, chat_tokenizer(), policy, {"seed": 3})
    assert not (policy / "model.safetensors").exists()
    ours = sequence_logps(model, rows, 500)
    assert torch.equal(logps(policy, rows), ours)
    load_checkpoint(policy).save_pretrained("merged")
    torch.testing.assert_close(logps("merged", rows), ours, rtol=1e-5, atol=1e-4)
    from peft import AutoPeftModelForCausalLM

    peft = AutoPeftModelForCausalLM.from_pretrained(policy, dtype=torch.float32).merge_and_unload()
    peft.save_pretrained("by-peft")
    torch.testing.assert_close(logps("by-peft", rows), ours, rtol=1e-5, atol=1e-4)


def layers_of(model):
    return [(n, p) for n, p in model.model.named_parameters() if ".layers." in n and p.ndim == 2]


def test_continue_keeps_the_data_types_of_base_and_adapter(folder, rows, monkeypatch):
    model = load_weights(AutoModelForCausalLM, "models/own/base", dtype="bfloat16")
    model.float().save_pretrained("models/own/base")
    expected = sequence_logps(load_model(fetched("continue"), "bf16", frozen=True), rows, 500)
    model.bfloat16().save_pretrained("models/own/base")
    base = fetched("continue")
    weights, adapter = (load_file(base / f"{name}.safetensors") for name in ("model", "adapter_model"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(
        torch.equal(weights[name], weight) for name, weight in model.state_dict().items() if name in weights
    )
    own = load_file(f"{ADAPTER}/adapter_model.safetensors")
    assert adapter.keys() == own.keys()
    assert all(torch.equal(adapter[name], own[name]) for name in own)
    monkeypatch.setattr("dpo.engine.logprobs.load_causal_lm", None)  # no copies in fp32
    for frozen in ("base", True):
        loaded = load_model(base, "bf16", frozen=frozen)
        kinds = {"adapter" if "lora_" in name else "base": w.dtype for name, w in layers_of(loaded)}
        assert kinds == {"base": torch.bfloat16, "adapter": torch.float32 if frozen == "base" else torch.bfloat16}
        for name, weight in layers_of(loaded):
            if "lora_" in name and frozen == "base":
                assert torch.equal(weight, own[f"base_model.model.{name.replace('.default', '')}"])
    assert torch.equal(sequence_logps(loaded, rows, 500), expected)


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (ADAPTER, {}, "is a LoRA adapter; set model.adapter to `merge` it into its base model, or `continue`"),
        ("models/own/base", {"adapter": "merge"}, "is not a LoRA adapter: it has no adapter_config.json; set"),
        ("default", {"adapter": "continue"}, "default is not a LoRA adapter"),
    ],
)
def test_an_adapter_and_its_setting_belong_together(folder, base, changes, words):
    with pytest.raises(InputError, match=r"params\.yaml: model\.adapter: ") as error:
        load_base(settings(base, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"base_model_name_or_path": "org/base"},
            "org/base is a hub id without a revision; set model.adapter_base_rev",
        ),
        ({"base_model_name_or_path": "/gone/llama"}, "copy the base model to models/own/llama and name that path"),
        ({"base_model_name_or_path": None}, "names the base model '', which does not exist"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_one_error(folder, changes, words):
    config = Path(ADAPTER, "adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InputError) as error:
        load_base(settings(adapter="merge"))
    assert str(error.value).startswith("params.yaml: model.base: ")
    assert words in str(error.value)


def test_an_adapter_of_another_model_is_an_error(folder):
    make_model("qwen2", Path("models/own/base"), hidden_size=16, intermediate_size=24)
    with pytest.raises(InputError, match="the adapter does not fit its base model"):
        load_base(settings(adapter="merge"))


def test_an_adapter_with_a_pickle_is_refused(folder):
    Path(ADAPTER, "adapter_model.safetensors").rename(Path(ADAPTER, "adapter_model.bin"))
    with pytest.raises(InputError, match="a pickle"):
        load_base(settings(adapter="merge"))


def test_the_base_of_an_adapter_may_be_beside_others_of_your_models(folder, rows, expected):
    config = Path(ADAPTER, "adapter_config.json")
    elsewhere = json.loads(config.read_text()) | {"base_model_name_or_path": "/home/someone/base"}
    config.write_text(json.dumps(elsewhere))
    torch.testing.assert_close(logps(fetched("merge"), rows), expected, rtol=1e-5, atol=1e-4)


def test_an_adapter_on_the_hub_is_downloaded_at_its_revision(folder, rows, expected, monkeypatch):
    shutil.move(ADAPTER, "downloaded")
    monkeypatch.setattr(base_model, "find_adapter_config_file", lambda name, revision: f"{name}@{revision}")
    asked = []
    monkeypatch.setattr(
        base_model,
        "snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, revision)) or "downloaded",
    )
    model, tokenizer = load_base(settings("someone/adapter", revision="abc", adapter="merge"))
    save_base(model, tokenizer, Path("models/base"))
    assert asked == [("someone/adapter", "abc")]
    torch.testing.assert_close(logps("models/base", rows), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def policy(folder, rows):
    """A policy that is an adapter of models/reference."""
    shutil.copytree("models/own/base", "models/reference")
    model = load_model(Path("models/reference"))
    cached = dict(zip((row.id for row in rows), sequence_logps(model, rows, 500).tolist(), strict=True))
    params = dpo_params(lora=LoraSettings(rank=4, alpha=8))
    train_dpo(model, rows, cached, params, trial(learning_rate=1e-2), max_tokens_per_microbatch=500)
    return model


def test_a_policy_loads_after_it_was_moved_with_its_reference(policy, rows, tmp_path, monkeypatch):
    save_checkpoint(policy, chat_tokenizer(), Path("models/policy"), {"seed": 3})
    ours = sequence_logps(policy, rows, 500)
    moved = shutil.move("models", tmp_path / "elsewhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert torch.equal(logps(moved / "policy", rows), ours)
    shutil.move(moved / "policy", tmp_path / "alone")
    with pytest.raises(
        InputError, match=r"alone: its base model 'models/reference' is neither in .* nor beside it"
    ):
        load_causal_lm(tmp_path / "alone")


def test_a_policy_of_a_hub_model_names_it_with_its_revision(policy, rows, tmp_path):
    save_checkpoint(policy, chat_tokenizer(), Path("models/policy"), {"seed": 3}, ("Org/Model", "abc"))
    config = json.loads(Path("models/policy/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Org/Model", "abc")
    assert adapter_base(Path("models/policy")) == (Path("models/reference"), None)
    assert torch.equal(logps("models/policy", rows), sequence_logps(policy, rows, 500))
    shutil.move("models/policy", tmp_path / "alone")
    shutil.move("models/reference", tmp_path / "gone")
    assert adapter_base(tmp_path / "alone") == ("Org/Model", "abc")


@pytest.mark.slow
def test_the_import_of_peft_prints_nothing_about_optional_kernels():
    code = "import dpo.engine.base_model, peft, sys; print('bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n", "peft imports bitsandbytes"
    assert "kernel" not in done.stderr
