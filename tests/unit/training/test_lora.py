"""LoRA settings: target modules, rank-stabilised LoRA, DoRA; activations in host memory."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine.base_model import load_checkpoint
from dpo.engine.experts import expert_weights
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.packing import pack
from dpo.training import offload
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora, copy_checkpoint, save_checkpoint, start_lora, train_dpo
from tests.support.logprobs import make_rows
from tests.support.models import chat_tokenizer, make_model
from tests.support.training import LORA, dpo_params, trial


def trained(folder, rows, precision="fp32", quantization=None, **changes):
    """Train, and return log and model."""
    engine = {"precision": precision, "quantization": quantization}
    cached = sequence_logps(load_model(folder, **engine, frozen=True), rows, 1000).tolist()
    reference = {row.id: tuple(pair) for row, pair in zip(rows, cached, strict=True)}
    model = load_model(folder, **engine)
    log = train_dpo(model, rows, reference, dpo_params(**changes), trial(), max_tokens_per_microbatch=100)
    return log, model


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", [{"rslora": True}, {"dora": True}, {"target_modules": ("q_proj", "v_proj")}])
def test_each_kind_of_adapter_starts_at_the_reference_and_learns(
    change, precision, quantization, tiny_model_dir, rows, tmp_path
):
    lora = LoraSettings(rank=4, alpha=8, **change)
    log, model = trained(tiny_model_dir, rows, precision, quantization, lora=lora, epochs=4)
    assert log[0]["rewards/margins"] == log[0]["rewards/chosen"] == 0.0
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if ".lora_" in name}
    kinds = {name.rpartition(".")[2] for name in adapted}
    assert ("k_proj" in kinds) == (change.get("target_modules") is None)
    assert any("magnitude" in name for name, _ in model.named_parameters()) == ("dora" in change)


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(tiny_model_dir):
    scales = []
    for rslora in (False, True):
        model = load_model(tiny_model_dir)
        add_lora(model.model, LoraSettings(rank=4, alpha=8, rslora=rslora))
        scales.append(model.model.get_submodule("model.layers.0.self_attn.q_proj").scaling["default"])
    assert scales == [2.0, 4.0]


@pytest.mark.parametrize("change", [{"rslora": True}, {"dora": True}])
def test_a_saved_adapter_of_each_kind_gives_the_same_log_probs(change, tiny_model_dir, rows, tmp_path):
    from transformers import AutoTokenizer

    _, model = trained(tiny_model_dir, rows, lora=LoraSettings(rank=4, alpha=8, **change))
    save_checkpoint(model, AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "policy", {})
    again = load_model(tmp_path / "policy", frozen=True)
    torch.testing.assert_close(
        sequence_logps(again, rows, 1000), sequence_logps(model, rows, 1000), rtol=1e-6, atol=1e-5
    )
    load_checkpoint(tmp_path / "policy").save_pretrained(tmp_path / "merged")
    merged = sequence_logps(load_model(tmp_path / "merged"), rows, 1000)
    torch.testing.assert_close(merged, sequence_logps(model, rows, 1000), rtol=1e-4, atol=1e-3)
    names = load_file(tmp_path / "policy/adapter_model.safetensors")
    assert any("magnitude" in name for name in names) == ("dora" in change)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("nothing",), "lora.target_modules: Target modules"),
        (("lm_head",), "the vocabulary cannot have an adapter"),
    ],
)
def test_unusable_target_modules_are_an_error(names, message, tmp_path):
    model = load_model(make_model("llama", tmp_path, tie_word_embeddings=False))
    with pytest.raises(InputError, match=message):
        add_lora(model.model, LoraSettings(rank=4, alpha=8, target_modules=names))


@pytest.mark.parametrize("lora", [None, LORA])
def test_training_with_offloaded_activations_is_bit_equal(lora, tiny_model_dir, rows):
    results = []
    for checkpointing in (True, "offload"):
        log, model = trained(tiny_model_dir, rows, lora=lora, gradient_checkpointing=checkpointing)
        results.append(([entry["loss"] for entry in log], [p.detach() for p in model.parameters()]))
    (losses, ours), (other, theirs) = results
    assert losses == other
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_inputs_of_the_layers_are_offloaded(tmp_path, monkeypatch):
    model, copied = load_model(make_model("llama", tmp_path, num_hidden_layers=4)).train(), []
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    start_lora(model, LORA, 0)
    allocate = torch.empty

    def recorded(*shape, **options):
        copied.extend(map(tuple, shape[:1] if isinstance(shape[0], torch.Size) else []))
        return allocate(*shape, **options)

    monkeypatch.setattr(offload.torch, "empty", recorded)
    batch = pack(make_rows())
    with offload.offloaded_activations(model):
        total = model(batch).sum()
    assert copied.count((1, batch.input_ids.shape[1], 32)) >= 3, "all but the embedding, which has no gradient"
    assert {len(shape) for shape in copied if len(shape) == 3} == {3}
    total.backward()


def test_a_copied_adapter_has_further_facts_and_the_name_of_its_base(tiny_model_dir, tmp_path):
    model, tokenizer = load_model(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    start_lora(model, LORA, 0)
    save_checkpoint(model, tokenizer, tmp_path / "first", {"round": 2})
    copy_checkpoint(tmp_path / "first", tmp_path / "second", {"trial": "a"}, ("someone/base", "abc"))
    first, second = (json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("first", "second"))
    assert second == {**first, "trial": "a"}
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")]
    assert configs[1] == {**configs[0], "base_model_name_or_path": "someone/base", "revision": "abc"}
    assert configs[0] != configs[1]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_named_layers_of_a_mixture_get_adapters_and_routers_none(tmp_path, architecture):
    model = load_model(make_model(architecture, tmp_path / "m"))
    assert model.in_stream
    add_lora(model.model, LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj")))
    adapted = {name.split(".lora_")[0] for name, _ in model.model.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_all_linear_adapts_layers_and_experts_of_a_mixture_but_no_router(tmp_path, architecture, recwarn):
    model = load_model(make_model(architecture, tmp_path / "m"))
    add_lora(model.model, LoraSettings(rank=4, alpha=8))
    ours = {name: p for name, p in model.model.named_parameters() if ".lora_" in name}
    layer = [f"self_attn.{name}_proj" for name in "kqov"]
    layer += ["mlp.experts", "mlp.experts.base_layer"]  # down_proj, and gate_up_proj inside of it
    assert {name.split(".lora_")[0] for name in ours} == {f"model.layers.{i}.{x}" for i in range(2) for x in layer}
    ranks = {p.shape[0] for name, p in ours.items() if "experts" in name and "lora_A" in name}
    assert ranks == {4 * 4}, "rank 4 of each of 4 experts"
    assert {p.requires_grad for name, p in model.model.named_parameters() if "gate.weight" in name} == {False}
    assert not [str(w.message) for w in recwarn if "pattern" in str(w.message)]


def test_layers_that_peft_cannot_adapt_are_in_the_log(tmp_path, caplog):
    model = load_model(make_model("qwen3_moe", tmp_path / "m", mlp_only_layers=[0]))
    add_lora(model.model, LoraSettings(rank=4, alpha=8))
    assert "3 linear layers, such as model.layers.0.mlp.gate_proj, get no adapter" in caplog.text


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mixture_with_adapters_learns_and_loads_again_with_the_same_results(tmp_path, architecture, precision):
    rows, folder = make_rows(), make_model(architecture, tmp_path / "m")
    log, model = trained(folder, rows, precision, lora=LORA, epochs=4)
    assert log[0]["rewards/margins"] == log[0]["rewards/chosen"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"] - 0.02
    updates = [p for name, p in model.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(updates) == 4
    assert all(update.any() for update in updates)
    save_checkpoint(model, chat_tokenizer(), tmp_path / "policy", {})
    logps = sequence_logps(model, rows, 1000)
    policy = load_model(tmp_path / "policy", precision, frozen=True)
    assert torch.equal(sequence_logps(policy, rows, 1000), logps)
    assert policy.share_base(folder)
    load_checkpoint(tmp_path / "policy").save_pretrained(tmp_path / "merged")
    if precision == "fp32":
        merged = load_model(tmp_path / "merged", frozen=True)
        torch.testing.assert_close(sequence_logps(merged, rows, 1000), logps, rtol=1e-4, atol=1e-3)
    saved = json.loads((tmp_path / "policy/adapter_config.json").read_text())
    assert saved["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("precision", "weights"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_a_mixture_trains_all_weights_from_a_margin_of_zero(tmp_path, architecture, precision, weights):
    rows = make_rows()
    log, model = trained(make_model(architecture, tmp_path), rows, precision, weights=weights, epochs=4)
    assert log[0]["rewards/margins"] == 0.0
    assert log[-1]["loss"] < log[0]["loss"] - 0.02
    held = {weight.dtype for weight in expert_weights(model.model).values()}
    assert held == {torch.bfloat16 if weights == "bf16" else torch.float32}
