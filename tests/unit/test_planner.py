"""The planner compared with real models and with values computed by hand; the `plan` command."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo.common.errors import InputError
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
    shape_of,
    trained_parameters,
    training_memory,
)
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora
from tasks.commands.cli import app

PAIR, PAIRS = Pair(prompt=24, completion=16), 8
TOKENS = PAIRS * PAIR.tokens


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


def kept_bytes(model):
    """Return the bytes that a forward pass keeps for its backward pass, without parameters."""
    draw = torch.Generator().manual_seed(0)
    lengths = (PAIR.prompt, PAIR.completion, PAIR.completion)
    rows = []
    for number in range(PAIRS):
        prompt, *completions = (tuple(torch.randint(512, (n,), generator=draw).tolist()) for n in lengths)
        rows.append(TokenRow(str(number), prompt, tuple(completions)))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        model(pack(rows))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_equal_what_the_engine_keeps(folder, precision, rank, checkpointing):
    model = load_model(folder, precision).train()
    if rank is not None:
        add_lora(model.model, LoraSettings(rank=rank, alpha=16))
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    shape, setup = shape_of(model.model.config), Setup(TOKENS, precision, rank, checkpointing)
    assert trained_parameters(shape, rank) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = activations(shape, PAIR, setup)
    assert kept_bytes(model) == pytest.approx(expected, rel=0.03)


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
    lines = [line.split(" | ") for line in output.splitlines() if line.startswith("| all weights | on")]
    assert [("too much" in cell) for cell in lines[0]] == [False, False, True, True, False]
    assert "| reference pass |" in output
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
    AutoConfig.for_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no plan for a model with experts, 'mixtral'"):
        run(capsys, "--model", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither llama-1b, llama-8b, llama-70b nor a model"):
        run(capsys, "--model", str(tmp_path / "empty"))
