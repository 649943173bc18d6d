"""The planner compared with real models and with values computed by hand; the `plan` command."""

import math
import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.engine.flops import shape_of
from dpo.engine.frozen import round_linear_layers
from dpo.engine.logprobs import load_model
from dpo.engine.packing import pack
from dpo.engine.tokenization import TokenRow
from dpo.planner import (
    LLAMAS,
    Pair,
    Setup,
    activations,
    pair_flops,
    reference_memory,
    seconds,
    trained_parameters,
    training_memory,
)
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora
from tasks.commands.cli import app
from tasks.common.memory import STAGES, Hardware, check_memory, stage_memory
from tests.support.stored import PAIR, TOKENS, held_bytes, kept_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create a random Llama with grouped queries, so wide that small tensors are negligible."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("planner") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_activations_and_weights_equal_what_the_engine_keeps(folder, quantization, precision, rank, checkpointing):
    if quantization and not rank:
        pytest.skip("weights in NF4 are not trained")
    model = load_model(folder, precision, quantization=quantization).train()
    if rank is not None:
        add_lora(model.model, LoraSettings(rank=rank, alpha=16))
    model.hold_frozen_weights()
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    shape, setup = shape_of(model.model.config), Setup(TOKENS, precision, rank, checkpointing, quantization)
    assert trained_parameters(shape, rank) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = activations(shape, PAIR, setup)
    assert kept_bytes(model) == pytest.approx(expected, rel=0.03)
    planned = training_memory(shape, PAIR, setup, 0).weights
    assert held_bytes(model) == pytest.approx(planned, rel=0.01)


def test_trained_weights_in_bf16_are_counted(folder):
    model = load_model(folder, "bf16").train()
    round_linear_layers(model.model, trained=True)
    shape, setup = shape_of(model.model.config), Setup(TOKENS, "bf16", weights="bf16")
    assert kept_bytes(model) == pytest.approx(activations(shape, PAIR, setup), rel=0.03)
    planned = training_memory(shape, PAIR, setup, 0)
    assert held_bytes(model) == pytest.approx(planned.weights, rel=0.01)
    sum(model(pack([TokenRow("1", (1, 2), ((3, 4), (5,)))]))).backward()
    gradients = sum(weight.grad.numel() * weight.grad.element_size() for weight in model.parameters())
    assert gradients == pytest.approx(planned.gradients, rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-1b", 1.2358), ("llama-8b", 8.0303), ("llama-70b", 70.5537)]
)
def test_llama_parameters_equal_their_model_cards(name, billions):
    assert LLAMAS[name].parameters / 1e9 == pytest.approx(billions, abs=1e-4)


def test_flops_of_a_small_shape():
    # Matrices of a layer: q and o 64 * 64, k and v 64 * 32, three of 64 * 160. Attention: 300 (query, key)
    # positions in the prompt, and for each completion 136 in itself and 24 * 16 in the prompt.
    shape = replace(LLAMAS["llama-1b"], layers=4, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16)
    linear = 2 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) * 56
    attention, head = 4 * 4 * 64 * (300 + 2 * 136 + 2 * 384), 2 * 128256 * 64 * 32
    assert pair_flops(shape, PAIR, None) == (linear + attention, head)
    assert pair_flops(shape, PAIR, Setup(TOKENS)) == (3 * (linear + attention), 4 * head)
    lora = Setup(TOKENS, lora_rank=8, gradient_checkpointing=True)
    assert pair_flops(shape, PAIR, lora) == (3 * linear + 4 * attention, 3 * head)
    assert seconds((600, 40), 2, (100, 10)) == 5


def test_memory_of_llama_8b():
    shape = LLAMAS["llama-8b"]
    setup = Setup(max_tokens_per_microbatch=64)
    alone = training_memory(shape, PAIR, setup, overhead=7)
    assert (alone.weights, alone.gradients, alone.optimizer, alone.overhead) == (
        4 * shape.parameters, 4 * shape.parameters, 8 * shape.parameters, 7
    )  # fmt: skip
    assert alone.total == sum(vars(alone).values())
    whole = reference_memory(shape, setup, overhead=7, models=2)
    shards = reference_memory(shape, replace(setup, sharding="full", gpus=8), overhead=7, models=2)
    assert whole.weights == 2 * 4 * shape.parameters
    assert shards.weights == whole.weights / 8 + 4 * (2 * shape.head + 2 * shape.layer)
    assert shards.total - shards.weights == whole.total - whole.weights
    sharded = training_memory(shape, PAIR, replace(setup, sharding="full", gpus=8), overhead=7)
    assert 8 * sharded.weights == alone.weights
    assert 8 * sharded.optimizer == alone.optimizer
    assert sharded.temporary > alone.temporary
    buckets = training_memory(shape, PAIR, replace(setup, sharding="data", gpus=8), overhead=7)
    # One process accumulates the gradient of the vocabulary matrix in place.
    assert buckets.total - alone.total == pytest.approx(alone.gradients + 4 * shape.head)
    assert reference_memory(shape, setup, overhead=7).total < alone.total / 3
    # Without accumulation, gradients and activations do not exist at the same time.
    one = training_memory(
        shape, PAIR, replace(setup, max_tokens_per_microbatch=10**6, accumulates=False), overhead=7
    )
    assert (one.gradients, one.activations > 0) == (0, True)


def run(capsys, *arguments):
    app(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_prints_which_settings_fit(capsys, folder):
    output = run(capsys, "--model", "llama-70b", "--gpus", "8")
    stages = [line.split(" | ")[0] for line in output.splitlines() if line.startswith("| ")]
    assert stages[1:7] == ["| ---", *(f"| {stage}" for stage in STAGES)]
    lines = [line.split(" | ") for line in output.splitlines() if line.startswith("| all weights | on")]
    assert [("too much" in cell) for cell in lines[0]] == [False, False, True, True, False]
    assert re.search(r"\| reference_logprobs \| 26\d\.\d \(too much\) \| 4\d\.\d \|", output)
    assert "DDP" not in run(capsys, "--model", str(folder))
    gib = []
    for tokens in ("2000", "4000"):
        output = run(capsys, "--model", "llama-8b", "--prompt-tokens", tokens)
        (line,) = [line for line in output.splitlines() if line.startswith("| all weights | off")]
        gib.append(float(line.split(" | ")[2].split()[0]))
    assert gib[0] < gib[1], "a pair longer than the budget gets its own micro-batch"
    double = ("--model", str(folder), "--utilisation", "0.5", "--pairs")
    hours = [float(run(capsys, *double, n).split()[-2]) for n in ("1000000000", "2000000000")]
    assert math.isclose(hours[1] / hours[0], 2, rel_tol=0.1)


def test_an_unsupported_model_is_an_error(capsys, tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no plan for a model of type 'gpt2'"):
        run(capsys, "--model", str(tmp_path))
    for kind, changes, named in (
        ("deepseek_v3", {}, "kv_lora_rank"),
        ("llama4_text", {}, "intermediate_size_mlp"),
        ("ernie4_5_moe", {}, "moe_num_shared_experts"),
        ("granitemoeshared", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
        ("qwen3_next", {}, "layer_types"),
        ("gpt_neox", {"num_hidden_layers": 2}, "parameters, but the model has "),  # its MLP has no gate
    ):
        AutoConfig.for_model(kind, **changes).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"no plan for a model of type '{kind}': .*{named}"):
            run(capsys, "--model", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither default, .*, mixtral-8x7b nor a model"):
        run(capsys, "--model", str(tmp_path / "empty"))


def params(tmp_path, **changes):
    """Return the path of parameters with changes of lines, as `{"precision: fp32": "precision: bf16"}`."""
    text = (ROOT / "params.yaml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text)
    return tmp_path / "params.yaml"


LORA_BF16 = {
    "precision: fp32": "precision: bf16",
    "lora: null": "lora: {rank: 16, alpha: 32}",
    "gradient_checkpointing: false": "gradient_checkpointing: true",
}


@pytest.mark.parametrize(
    ("model", "changes", "tokens", "gib"),
    [
        ("llama-8b", {}, 2048, 22),
        ("llama-8b", {"vocabulary": "bf16"}, 2048, 20),
        ("llama-8b", {"quantization": "nf4"}, 2048, 12),
        ("llama-70b", {"quantization": "nf4"}, 2048, 80),
        ("llama-8b", {}, 32768, 80),
    ],
)
def test_planned_memory_of_the_targets(model, changes, tokens, gib, tmp_path):
    settings = load_params(params(tmp_path, **LORA_BF16))
    engine = replace(settings.engine, max_tokens_per_microbatch=1024, **changes)
    settings, pair = replace(settings, engine=engine, sft=None), Pair(tokens // 2, tokens // 4)
    train = stage_memory("train", settings, LLAMAS[model], pair, Hardware())
    assert train.total < gib * 2**30
    scoring = stage_memory("reference_logprobs", settings, LLAMAS[model], pair, Hardware())
    assert scoring.total < gib * 2**30


def test_a_row_for_every_stage_that_runs_a_model(capsys, tmp_path):
    file = params(tmp_path, **LORA_BF16)
    output = run(capsys, "--model", "llama-8b", "--params", str(file), "--pairs", "1000")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in output.splitlines() if line.startswith("| ")}
    gib = {stage: float(rows[f"| {stage}"][1].split()[0]) for stage in STAGES}
    assert gib["reference_logprobs"] < gib["train"] < 24 < gib["sft"]
    assert "8.03 billion parameters; 1,000 pairs of 768 tokens; bf16" in output
    # One model in evaluate, because the reference is the policy without its adapter.
    full = load_params(params(tmp_path, **{"precision: fp32": "precision: bf16"}))
    two = stage_memory("evaluate", full, LLAMAS["llama-8b"], Pair(256, 256), Hardware())
    lora = load_params(params(tmp_path, **LORA_BF16))
    one = stage_memory("evaluate", lora, LLAMAS["llama-8b"], Pair(256, 256), Hardware())
    assert 1.5 < two.weights / one.weights < 2.5
    assert "sft: set sft.gradient_checkpointing: true, sft.lora: {rank: 16, alpha: 32} (" in output


def test_a_continued_adapter_is_evaluated_with_one_model(tmp_path):
    bf16 = load_params(params(tmp_path, **{"precision: fp32": "precision: bf16"}))
    continued = replace(bf16, sft=None, model=replace(bf16.model, adapter="continue"))
    sizes = LLAMAS["llama-8b"], Pair(256, 256), Hardware()
    one, two = (stage_memory("evaluate", each, *sizes).weights for each in (continued, bf16))
    assert two == 2 * one


def test_the_server_that_samples_is_named_with_its_memory(capsys, tmp_path):
    def notes(sampler):
        file = params(tmp_path, **{**LORA_BF16, "samples: 256": f"sampler: {sampler}\n  samples: 256"})
        output = run(capsys, "--model", "llama-8b", "--params", str(file), "--pairs", "1000")
        rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) ", output, re.MULTILINE))
        return rows, [line for line in output.splitlines() if line.startswith("evaluate.sampler")]

    rows, found = notes("transformers")
    assert found == []
    vllm, (note,) = notes("vllm")
    # 8.03 billion weights of 2 bytes; 32 layers of keys and values of 8 heads of 128 for 512 tokens.
    assert "It needs 15.0 GiB for weights and one response of 512 tokens" in note
    assert "uses most of the 80 GiB" in note
    _, (note,) = notes("{kind: openai, base_url: 'http://127.0.0.1:8000/v1'}")
    assert "the memory of the server at http://127.0.0.1:8000/v1 is not planned" in note
    assert vllm["evaluate"] == vllm["reference_samples"], "both only score"
    assert vllm["train"] == rows["train"]


def test_the_rows_of_the_source_are_counted(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "data/own/pairs.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 37)
    changes = {"source: default": "source: data/own/pairs.jsonl", "max_train_pairs: 160": "max_train_pairs: null"}
    file = params(tmp_path, **changes)
    assert "; 37 pairs of 768 tokens" in run(capsys, "--model", "llama-1b", "--params", str(file))
    file = params(tmp_path, **{**changes, "max_train_pairs: 160": "max_train_pairs: 20"})
    assert "; 20 pairs of" in run(capsys, "--model", "llama-1b", "--params", str(file))
    file = params(tmp_path, **{"max_train_pairs: 160": "max_train_pairs: null"})
    assert "; 100,000 pairs (assumed) of" in run(capsys, "--model", "llama-1b", "--params", str(file))


def test_a_stage_that_does_not_fit_stops_and_names_settings_with_which_it_fits(folder, tmp_path, monkeypatch):
    settings = load_params(params(tmp_path))
    shape, pair = shape_of(AutoConfig.from_pretrained(folder)), Pair(256, 256)
    check_memory("train", settings, folder, pair)
    full, small = (
        stage_memory("train", each, shape, pair, Hardware(on_gpu=False)).total
        for each in (settings, replace(settings, dpo=replace(settings.dpo, gradient_checkpointing=True)))
    )
    host = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host._replace(total=(full + small) / 2))
    message = rf"planned {full / 2**30:.1f} GiB, available .* set dpo.gradient_checkpointing: true \("
    with pytest.raises(InputError, match=message):
        check_memory("train", settings, folder, pair)
    check_memory("train", replace(settings, run=replace(settings.run, check_memory=False)), folder, pair)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host._replace(total=1000))
    with pytest.raises(InputError, match=r"reference_logprobs: .*use a smaller model or several GPUs"):
        check_memory("reference_logprobs", settings, folder)
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "gpt2")
    check_memory("train", settings, tmp_path / "gpt2", pair)
