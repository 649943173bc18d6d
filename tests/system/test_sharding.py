"""Sharded models score, sample and compare like whole ones, and each process holds its share of the weights."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dpo.engine.logprobs import load_model
from dpo.training.train import save_checkpoint, train_dpo
from tests.support.launch import FSDP, ROOT, start
from tests.support.models import chat_tokenizer, make_model
from tests.support.training import LORA, dpo_params, make_reference, make_rows, trial

SCRIPT, TRAINING = ROOT / "tests/support/sharded.py", ROOT / "tests/support/launched.py"
SAVING = ROOT / "tests/support/saved.py"


def saved_model(folder, architecture="llama", seed=0, **changes):
    tokenizer = chat_tokenizer()
    end = tokenizer.eos_token_id
    ids = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    make_model(
        architecture, folder, seed, vocab_size=len(tokenizer), max_position_embeddings=512, **ids, **changes
    )
    tokenizer.save_pretrained(folder)
    return folder


def saved_adapter(base, folder):
    rows, model = make_rows(base, 8), load_model(base)
    reference, settings = make_reference(base, rows), dpo_params(lora=LORA)
    train_dpo(model, rows, reference, settings, trial(learning_rate=0.1), max_tokens_per_microbatch=300)
    save_checkpoint(model, AutoTokenizer.from_pretrained(base), folder, {})
    return folder


def results(processes, policy, reference, out, **settings):
    out.mkdir()
    config = FSDP if processes > 1 else None
    done = start(processes, SCRIPT, policy, reference, out, json.dumps(settings), config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["processes"] == processes
    return result, done.stderr


def check(shared, alone):
    assert shared["held"] == pytest.approx(alone["held"] / shared["processes"], rel=0.01)
    assert shared["responses"] == alone["responses"]
    assert len(shared["logps"]) == 270
    for name, logps in alone["logps"].items():
        assert shared["logps"][name] == pytest.approx(logps, abs=1e-4)
    for ours, theirs in zip(shared["kl"], alone["kl"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(row["kl"] for row in alone["kl"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "architecture", "changes", "settings"),
    [
        (2, "llama", {"tie_word_embeddings": True}, {}),
        (4, "llama", {"tie_word_embeddings": False}, {"precision": "bf16"}),
        (2, "gpt2", {}, {}),
        (2, "opt", {}, {}),
        (2, "qwen3_moe", {}, {}),
        (2, "mixtral", {}, {}),
    ],
)
def test_sharded_models_have_the_results_of_whole_ones(processes, architecture, changes, settings, tmp_path):
    policy = saved_model(tmp_path / "policy", architecture, 0, **changes)
    reference = saved_model(tmp_path / "reference", architecture, 1, **changes)
    alone, _ = results(1, policy, reference, tmp_path / "alone", **settings)
    shared, output = results(processes, policy, reference, tmp_path / "shared", **settings)
    assert ("another name" in output) == (architecture in ("qwen3_moe", "mixtral"))
    check(shared, alone)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"lora": True}, {"router_aux_loss": 0.1}])
def test_a_sharded_mixture_trains_like_a_whole_one(settings, tmp_path):
    model, logs = saved_model(tmp_path / "model", "mixtral"), []
    for count in (1, 2):
        out, options = tmp_path / str(count), {**settings, "sharded": count > 1}
        done = start(count, TRAINING, model, out, json.dumps(options), config=FSDP if count > 1 else None)
        assert done.returncode == 0, done.stderr[-3000:]
        logs.append(json.loads(out.with_suffix(".json").read_text())[1])
    assert len(logs[0]) == len(logs[1]) == 4
    assert logs[0][0]["rewards/margins"] == 0
    for alone, shared in zip(*logs, strict=True):
        assert shared == pytest.approx({**alone, "epoch": shared["epoch"]}, rel=1e-4, abs=1e-4)
    weights = [load_file(next((tmp_path / count).glob("*.safetensors"))) for count in ("1", "2")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_adapter_has_the_results_of_a_whole_one(tmp_path):
    base = saved_model(tmp_path / "base")
    policy = saved_adapter(base, tmp_path / "policy")
    alone, _ = results(1, policy, base, tmp_path / "alone")
    shared, _ = results(2, policy, base, tmp_path / "shared")
    check(shared, alone)


@pytest.mark.slow
def test_a_policy_and_a_reference_with_one_adapter_each_are_two_sharded_models(tmp_path):
    base = saved_model(tmp_path / "base")
    reference = saved_adapter(base, tmp_path / "adapter")
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ):  # base model and adapter in one folder
        (reference / name).write_bytes((base / name).read_bytes())
    policy = saved_model(tmp_path / "policy", seed=1)
    alone, _ = results(1, policy, reference, tmp_path / "alone")
    shared, _ = results(2, policy, reference, tmp_path / "shared")
    check(shared, alone)


@pytest.mark.slow
def test_a_model_whose_packed_stream_is_not_exact_is_scored_with_sharded_weights(tmp_path):
    model = saved_model(tmp_path / "model", "bloom")
    (alone, _), (shared, _) = (results(count, model, model, tmp_path / str(count)) for count in (1, 2))
    assert not shared["in_stream"]
    for name, logps in alone["logps"].items():
        assert shared["logps"][name] == pytest.approx(logps, abs=1e-4)
    assert len(shared["responses"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes", "streamed"),
    [
        ("llama", {"tie_word_embeddings": False, "num_hidden_layers": 4}, True),
        ("qwen2", {"tie_word_embeddings": True}, True),
        ("gpt2", {}, True),
        ("qwen3_moe", {}, False),
    ],
)
def test_a_sharded_model_is_saved_file_by_file_as_a_whole_one(architecture, changes, streamed, tmp_path):
    model, limit = saved_model(tmp_path / "model", architecture, **changes), 30_000
    for count in (1, 2):
        done = start(count, SAVING, model, tmp_path / str(count), limit, config=FSDP if count > 1 else None)
        assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2)]
    assert [each["sharded"] for each in facts] == [False, True]
    alone, shared = ({file.name: file.read_bytes() for file in (tmp_path / count).iterdir()} for count in "12")
    assert len([name for name in alone if name.endswith(".safetensors")]) > 2
    assert alone == shared
    if streamed:
        assert 0 < facts[1]["peak"] <= max(limit, facts[1]["largest"]) < facts[1]["whole"] / 2
    weights = load_model(tmp_path / "2").model.state_dict()
    for name, value in load_model(model).model.state_dict().items():
        assert torch.equal(weights[name], value)


@pytest.mark.slow
def test_quantised_weights_are_not_sharded(tmp_path):
    model = saved_model(tmp_path / "model")
    done = start(2, SCRIPT, model, model, tmp_path, json.dumps({"quantization": "nf4"}), config=FSDP)
    assert done.returncode != 0
    assert "engine.quantization does not work with sharded weights" in done.stderr
