"""The plan of mixtures of experts compared with real models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from dpo.engine.experts import expert_weights
from dpo.engine.flops import checked_shape, shape_of
from dpo.engine.logprobs import load_model
from dpo.planner import (
    MIXTURES,
    Setup,
    activations,
    frozen_weights,
    pair_flops,
    trained_parameters,
    training_memory,
)
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora
from tasks.commands.cli import app
from tests.support.stored import PAIR, TOKENS, held_bytes, kept_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "sizes", "tolerance"),
    [
        ("mixtral", {"num_local_experts": 8, "intermediate_size": 160}, 0.03),
        # Norms of queries and keys are not planned, in a model without experts neither.
        ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 96, "head_dim": 16}, 0.1),
        (
            "qwen2_moe",
            {
                "num_experts": 8, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 200,
                "intermediate_size": 320, "mlp_only_layers": [1], "qkv_bias": False,
            },
            0.05,
        ),
        (
            "glm4_moe",
            {
                "n_routed_experts": 8, "moe_intermediate_size": 96, "n_shared_experts": 2,
                "intermediate_size": 320, "first_k_dense_replace": 1, "head_dim": 16,
            },
            0.1,
        ),
    ],
)  # fmt: skip
def test_activations_and_weights_of_a_mixture_equal_what_the_engine_keeps(
    kind, sizes, tolerance, precision, rank, checkpointing, tmp_path
):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, num_experts_per_tok=3, sliding_window=None, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, precision).train()
    shape, setup = shape_of(model.model.config), Setup(TOKENS, precision, rank, checkpointing)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(shape.parameters, rel=1e-3)
    if rank is not None:
        if kind == "glm4_moe":
            pytest.skip("peft gives no adapters to its MLPs and shared experts, which the plan counts")
        add_lora(model.model, LoraSettings(rank=rank, alpha=16))
    model.hold_frozen_weights()
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(shape, rank) == pytest.approx(trained, rel=1e-3)
    assert kept_bytes(model) == pytest.approx(activations(shape, PAIR, setup), rel=tolerance)
    assert held_bytes(model) == pytest.approx(training_memory(shape, PAIR, setup, 0).weights, rel=0.01)


def on_meta(kind, **changes):
    """Return the shape of a mixture, and its parameters counted in a model: all and active ones."""
    config = AutoConfig.for_model(kind, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(weight.numel() for weight in expert_weights(model).values())
    counted = sum(weight.numel() for weight in model.parameters())
    shape = checked_shape(config)
    return shape, counted, counted - experts * (shape.experts - shape.active) / shape.experts


DENSE = {"decoder_sparse_step": 2, "mlp_only_layers": [3, 5]}


@pytest.mark.parametrize(
    ("kind", "changes", "dense", "shared"),
    [
        ("qwen2_moe", {"num_hidden_layers": 4}, 0, 5632),
        ("qwen2_moe", {"num_hidden_layers": 8, "shared_expert_intermediate_size": 512, **DENSE}, 6, 512),
        ("qwen3_moe", {"num_hidden_layers": 8, "decoder_sparse_step": 3}, 6, 0),
        ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [0]}, 1, 0),
        ("glm4_moe", {"num_hidden_layers": 5, "first_k_dense_replace": 2, "n_shared_experts": 3}, 2, 3 * 1408),
        ("dots1", {"num_hidden_layers": 3, "n_routed_experts": 16, "n_shared_experts": 2,
                   "num_experts_per_tok": 4, "first_k_dense_replace": 1}, 1, 2 * 1408),
        ("olmoe", {"num_hidden_layers": 2}, 0, 0),
    ],
)  # fmt: skip
def test_parameters_of_shared_experts_and_layers_without_experts_are_counted(kind, changes, dense, shared):
    shape, counted, active = on_meta(kind, **changes)
    assert (shape.dense_layers, shape.shared) == (dense, shared)
    assert shape.parameters == pytest.approx(counted, rel=1e-3)
    assert shape.active_parameters == pytest.approx(active, rel=1e-3)
    assert pair_flops(shape, PAIR, None)[0] == pytest.approx(
        # every active weight multiplies each token, except embedding and head
        2 * PAIR.tokens * (active - 2 * shape.head) + 4 * shape.layers * shape.query * PAIR.seen, rel=1e-2
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_nf4_does_not_apply_to_experts_which_log_and_plan_say(kind, tmp_path, caplog, capsys):
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16} if kind == "qwen3_moe" else {}
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, num_experts_per_tok=2, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_model(tmp_path, "bf16", frozen=True)
    assert "does not apply" not in caplog.text
    model = load_model(tmp_path, "bf16", quantization="nf4", frozen=True)
    shape, setup = shape_of(model.model.config), Setup(TOKENS, "bf16", quantization="nf4")
    assert held_bytes(model) == pytest.approx(frozen_weights(shape, setup), rel=0.01)
    assert f"nf4 does not apply to the experts of {type(model.model).__name__}: " in caplog.text
    assert f" {shape.expert_parameters:,} parameters keep " in caplog.text
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("lora: null", "lora: {rank: 16, alpha: 32}")
    (tmp_path / "params.yaml").write_text(text.replace("precision: fp32", "precision: bf16\n  quantization: nf4"))
    for name, noted in (("llama-1b", False), ("qwen3-30b-a3b", True)):
        app(["plan", "--model", name, "--params", str(tmp_path / "params.yaml")], standalone_mode=False)
        assert ("nf4 applies to linear layers, not to experts: 95%" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    ("name", "config", "billions", "active"),
    [
        (
            "qwen3-30b-a3b",
            Qwen3MoeConfig(
                num_hidden_layers=48, hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144,
                num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128,
                num_experts_per_tok=8,
            ),
            30.5,
            3.3,
        ),
        ("mixtral-8x7b", MixtralConfig(), 46.7, 12.9),
    ],
)  # fmt: skip
def test_parameters_of_mixtures_equal_the_published_ones(name, config, billions, active):
    shape = shape_of(config)
    assert shape == MIXTURES[name]
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-4)


def test_a_plan_of_a_mixture_needs_memory_for_all_experts_and_time_for_the_active_ones(capsys):
    setup = Setup(8192, "bf16", gradient_checkpointing=True)
    shape = MIXTURES["mixtral-8x7b"]
    dense = replace(shape, experts=0, active=1, intermediate=2 * shape.intermediate)
    ratio = sum(pair_flops(shape, PAIR, setup)) / sum(pair_flops(dense, PAIR, setup))
    assert ratio == pytest.approx(1, rel=0.001), "two experts of a token cost as much as an MLP of twice the width"
    assert training_memory(shape, PAIR, setup, 0).weights == 4 * shape.parameters
    app(["plan", "--model", "qwen3-30b-a3b", "--gpus", "8"], standalone_mode=False)
    assert "30.53 billion parameters (3.35 active)" in capsys.readouterr().out
