"""Weights that are not trained: in bf16 with the same results, in NF4, and a vocabulary in bf16."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.engine import head
from dpo.engine.base_model import save_base
from dpo.engine.frozen import is_quantised
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.packing import pack
from dpo.engine.pretrained import checkpoint_dtype, load_causal_lm
from dpo.engine.reference_cache import cache_key, load_reference, shard_table, write_cache
from dpo.engine.tokenization import encode_pairs
from dpo.evaluation.kl import divergence
from dpo.evaluation.sampling import sample
from dpo.training.checkpoints import CheckpointStore
from dpo.training.train import add_lora, save_checkpoint, train_dpo
from tasks.commands.merge import merge
from tests.support.logprobs import make_rows
from tests.support.models import chat_tokenizer, make_model
from tests.support.training import LORA, PARAMS, dpo_params, make_pairs, trial

ROOT = Path(__file__).parents[3]
FROZEN = ["llama", "qwen2", "gemma3", "gpt2", "phi"]
MIXTURES = ["qwen3_moe", "mixtral"]


def layers(model):
    return {name: p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}


def randomise_adapter(model):
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(weight, std=0.2)


@pytest.mark.parametrize("architecture", FROZEN + MIXTURES)
def test_frozen_weights_in_bf16_give_bit_equal_log_probs(architecture, tmp_path):
    folder, rows = make_model(architecture, tmp_path), make_rows()
    trained, frozen = load_model(folder, "bf16"), load_model(folder, "bf16", frozen=True)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    held = {name for name, p in frozen.named_parameters() if p.dtype == torch.bfloat16}
    assert held, "the matrices of the layers"
    assert not [name for name in held if "embed" in name or "norm" in name or "lm_head" in name or "ln_" in name]
    assert torch.equal(sequence_logps(trained, rows, 1000), sequence_logps(frozen, rows, 1000))


def test_frozen_weights_in_fp32_stay(tmp_path):
    model = load_model(make_model("llama", tmp_path), frozen=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", FROZEN)
def test_gradients_of_adapters_on_a_bf16_base_are_bit_equal(architecture, tmp_path):
    rows, results = make_rows(), []
    model = load_model(make_model(architecture, tmp_path), "bf16")
    add_lora(model.model, LORA)
    randomise_adapter(model)
    for engine in (copy.deepcopy(model), model):
        if engine is model:
            engine.hold_frozen_weights()
            assert {p.dtype for p in engine.parameters() if p.requires_grad} == {torch.float32}
            assert torch.bfloat16 in {p.dtype for p in engine.parameters()}
        scores = engine(pack(rows))
        scores.sum().backward()
        results.append([scores.detach(), *(p.grad for p in engine.parameters() if p.requires_grad)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def in_bf16_and_fp32(architecture, folder):
    """Save a checkpoint in bf16, and another one with the same values in fp32."""
    model = load_causal_lm(make_model(architecture, folder / "random")).bfloat16()
    model.save_pretrained(folder / "bf16")
    model.float().save_pretrained(folder / "fp32")
    return folder / "bf16", folder / "fp32"


@pytest.mark.parametrize("architecture", [*FROZEN, *MIXTURES, "opt", "gpt_neox", "olmo2"])
def test_a_checkpoint_in_bf16_is_loaded_without_fp32_layers_and_with_the_same_results(
    architecture, tmp_path, monkeypatch
):
    narrow, wide = in_bf16_and_fp32(architecture, tmp_path)
    assert [checkpoint_dtype(folder) for folder in (narrow, wide)] == ["bfloat16", "float32"]
    rows, expected = make_rows(), load_model(wide, "bf16", frozen=True)
    dtypes = {name: weight.dtype for name, weight in expected.named_parameters()}
    with monkeypatch.context() as patch:
        if architecture != "gemma3":  # it computes a factor in the data type of the checkpoint
            patch.setattr("dpo.engine.logprobs.load_causal_lm", None)
        for frozen in (True, "base"):
            model = load_model(narrow, "bf16", frozen=frozen)
            assert model.in_stream == expected.in_stream
            assert frozen == "base" or {name: w.dtype for name, w in model.named_parameters()} == dtypes
            assert torch.equal(sequence_logps(model, rows, 1000), sequence_logps(expected, rows, 1000))
    assert {p.dtype for p in load_model(narrow, "fp32", frozen=True).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(narrow, "bf16").parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_a_checkpoint_in_bf16_have_the_same_fp32_weights(architecture, dora, tmp_path):
    folders, results = in_bf16_and_fp32(architecture, tmp_path), []
    rows = make_rows()
    reference = {row.id: (-20.0, -20.0) for row in rows}
    lora = dataclasses.replace(LORA, dora=dora)
    for folder in folders:
        model = load_model(folder, "bf16", frozen="base")
        log = train_dpo(
            model, rows, reference, dpo_params(lora=lora), trial(learning_rate=1e-2), max_tokens_per_microbatch=100
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        save_checkpoint(model, chat_tokenizer(), folder / "policy", {})
        trained = load_file(folder / "policy/adapter_model.safetensors")
        loaded = load_model(folder / "policy", "bf16", frozen="base")
        state = loaded.model.state_dict()
        for name, value in trained.items():
            place = name.removeprefix("base_model.model.").replace("weight", "default.weight")
            assert torch.equal(
                value, state.get(place, state.get(f"{place}.default.weight", state.get(f"{place}.default")))
            )
        results.append(([e["loss"] for e in log], trained, sequence_logps(loaded, rows, 1000)))
    (losses, ours, logps), (other_losses, theirs, other_logps) = results
    assert losses == other_losses
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logps, other_logps)


def test_training_and_sampling_with_a_bf16_base_are_bit_equal(tiny_model_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows, results = encode_pairs(make_pairs(8), tokenizer, 200), []
    for held in (True, False):
        if not held:
            monkeypatch.setattr("dpo.engine.logprobs.LogProbModel.hold_frozen_weights", lambda self: None)
        model = load_model(tiny_model_dir, "bf16")
        cached = sequence_logps(load_model(tiny_model_dir, "bf16", frozen=True), rows, 1000).tolist()
        reference = {row.id: tuple(pair) for row, pair in zip(rows, cached, strict=True)}
        log = train_dpo(model, rows, reference, dpo_params(lora=LORA), trial(), max_tokens_per_microbatch=100)
        assert log[0]["rewards/margins"] == 0.0
        responses = sample(model, tokenizer, ["Say."] * 3, max_new_tokens=8, temperature=1.0, seed=1)
        results.append((log, responses, [p.detach() for p in model.parameters() if p.requires_grad]))
    (log, responses, ours), (other_log, other_responses, theirs) = results
    assert [e["loss"] for e in log] == [e["loss"] for e in other_log]
    assert responses == other_responses
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def dequantised(model):
    """Return an fp32 copy of a model, with the values of its NF4 weights."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain = copy.deepcopy(model)
    for name, module in list(plain.model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            linear = nn.Linear(*weight.T.shape, bias=module.bias is not None)
            linear.weight.data = weight
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            plain.model.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_nf4_computes_with_the_dequantised_weights(architecture, tmp_path):
    folder, rows = make_model(architecture, tmp_path, hidden_size=64, intermediate_size=96), make_rows()
    model = load_model(folder, quantization="nf4", frozen=True)
    assert model.in_stream
    assert is_quantised(model.model)
    exact = load_model(folder)
    stored = sum(p.numel() * p.element_size() for p in layers(model).values())
    assert 7 < sum(p.numel() * 4 for p in layers(exact).values()) / stored < 9
    scores = sequence_logps(model, rows, 1000)
    torch.testing.assert_close(scores, sequence_logps(dequantised(model), rows, 1000), rtol=1e-5, atol=1e-4)
    assert (scores - sequence_logps(exact, rows, 1000)).abs().max() > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nf4_starts_at_margin_zero_learns_resumes_and_merges(precision, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = encode_pairs(make_pairs(12), tokenizer, 200)
    engine = dataclasses.replace(PARAMS.engine, precision=precision, quantization="nf4")
    frozen = load_model(tiny_model_dir, **engine.loading, frozen=True)
    key = cache_key(tiny_model_dir, tokenizer, rows, engine)
    write_cache(tmp_path / "cache", key, [shard_table(rows, sequence_logps(frozen, rows, 1000))])
    model = load_model(tiny_model_dir, **engine.loading)
    log = train_dpo(
        model, rows, load_reference(tmp_path / "cache", key), dpo_params(lora=LORA, epochs=3), trial(),
        max_tokens_per_microbatch=100, store=CheckpointStore(tmp_path / "progress", 0),
    )  # fmt: skip
    first, last = log[0], log[-1]
    assert first["rewards/margins"] == first["rewards/chosen"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert last["loss"] < math.log(2) - 0.05
    save_checkpoint(model, tokenizer, tmp_path / "policy", {})
    assert not (tmp_path / "policy/config.json").exists(), "the adapter alone"
    policy = load_model(tmp_path / "policy", **engine.loading, frozen=True)
    assert is_quantised(policy.model)
    assert torch.equal(sequence_logps(policy, rows, 1000), sequence_logps(model, rows, 1000))

    merge(tmp_path / "policy", tmp_path / "merged")
    base, merged = load_model(tiny_model_dir), load_model(tmp_path / "merged")
    assert not is_quantised(merged.model)
    name = "model.layers.0.self_attn.q_proj"
    adapter = policy.model.get_submodule(name)
    update = adapter.get_delta_weight("default").float()
    expected = base.model.get_submodule(name).weight + update
    torch.testing.assert_close(merged.model.get_submodule(name).weight, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("change", [{"quantization": "nf4"}, {"vocabulary": "bf16"}])
def test_the_cache_of_another_quantisation_or_vocabulary_is_refused(change, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = encode_pairs(make_pairs(2), tokenizer, 200)
    keys = [
        cache_key(tiny_model_dir, tokenizer, rows, dataclasses.replace(PARAMS.engine, **c)) for c in (change, {})
    ]
    for written, expected in (keys, keys[::-1]):
        folder = tmp_path / str(written[next(iter(change))])
        write_cache(folder, written, [shard_table(rows, torch.zeros(2, 2))])
        load_reference(folder, written)
        with pytest.raises(InputError, match=f"refused: {next(iter(change))} differ"):
            load_reference(folder, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_vocabulary_equals_its_rounded_fp32_values(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY_PART", 17)
    folder, rows = make_model("llama", tmp_path, tie_word_embeddings=tied), make_rows()
    rounded = load_model(folder, "bf16")
    for module in (rounded.model.get_input_embeddings(), rounded.get_output_embeddings()):
        module.weight.data = module.weight.data.bfloat16().float()
    half = load_model(folder, "bf16", vocabulary="bf16")
    results = []
    for model in (rounded, half):
        add_lora(model.model, LORA)
        randomise_adapter(model)
        model.hold_frozen_weights()
        scores = model(pack(rows))
        scores.sum().backward()
        results.append([scores.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    tables = {half.model.get_input_embeddings().weight.dtype, half.get_output_embeddings().weight.dtype}
    assert tables == {torch.bfloat16}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(list(half.logits(pack(rows)))), torch.cat(list(rounded.logits(pack(rows)))), rtol=1e-5, atol=1e-5
    )


def test_a_bf16_vocabulary_of_another_embedding_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"vocabulary: bf16: the embedding of Gemma3ForCausalLM is a Gemma3"):
        load_model(make_model("gemma3", tmp_path), "bf16", vocabulary="bf16", frozen=True)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_policy_without_its_adapter_is_the_reference(architecture, quantization, tmp_path, tiny_model_dir):
    # Gemma 2 is computed row by row.
    folder = make_model(architecture, tmp_path / "base", initializer_range=0.5, hidden_size=64)
    model = load_model(folder, quantization=quantization)
    add_lora(model.model, LORA)
    randomise_adapter(model)
    save_checkpoint(model, AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "policy", {})
    policy = load_model(tmp_path / "policy", quantization=quantization, frozen=True)
    reference = load_model(folder, quantization=quantization, frozen=True)
    assert policy.share_base(folder)
    assert not policy.share_base(tmp_path)
    assert not reference.share_base(folder)
    rows = make_rows()
    prompts, responses = [row.prompt for row in rows], [row.completions[0] for row in rows]
    one, two = (divergence(policy, each, prompts, responses, 40) for each in (None, reference))
    assert one.equals(two)
    assert (one["kl"] > 0).all()


@pytest.mark.parametrize("engine", [{}, {"precision": "bf16"}, {"precision": "bf16", "quantization": "nf4"}])
@pytest.mark.parametrize(("architecture", "dora"), [("llama", False), ("gemma2", False), ("llama", True)])
def test_a_continued_adapter_and_its_reference_are_one_model_with_two_adapters(
    architecture, dora, engine, tmp_path, tiny_model_dir
):
    folder = tmp_path / "reference"
    model = load_model(make_model(architecture, tmp_path / "base", initializer_range=0.5, hidden_size=64))
    add_lora(model.model, dataclasses.replace(LORA, dora=dora))
    randomise_adapter(model)
    save_base(model.model, AutoTokenizer.from_pretrained(tiny_model_dir), folder)
    model = load_model(folder)
    torch.manual_seed(5)
    for weight in (w for name, w in model.named_parameters() if "lora_A" in name):
        nn.init.normal_(weight, std=0.2)
    save_checkpoint(model, AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "policy", {})
    policy, two = (load_model(tmp_path / "policy", frozen=True, **engine) for _ in range(2))
    reference = load_model(folder, frozen=True, **engine)
    assert policy.share_base(folder)
    assert not reference.share_base(tmp_path / "base")
    rows = make_rows()
    prompts, responses = [row.prompt for row in rows], [row.completions[0] for row in rows]
    tables = [divergence(*models, prompts, responses, 40) for models in ((policy, None), (two, reference))]
    assert tables[0].equals(tables[1])
    assert (tables[0]["kl"] > 0.01).all()
    assert torch.equal(sequence_logps(policy, rows, 1000), sequence_logps(two, rows, 1000))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("precision: fp32", "precision: fp32\n  quantization: nf4", "quantization: nf4: these weights cannot be"),
        ("precision: fp32", "precision: bf16\n  vocabulary: bf16", "vocabulary: bf16: these weights cannot be"),
        ("precision: fp32", "precision: fp32\n  vocabulary: bf16", "vocabulary: bf16 needs engine.precision"),
    ],
)
def test_settings_of_frozen_weights_need_lora_and_bf16(old, new, message, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text((ROOT / "params.yaml").read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        load_params(file)
