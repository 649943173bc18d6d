"""Features that need a CUDA GPU: variable-length attention, compiled blocks and 8-bit optimizers."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.engine import attention
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.packing import pack
from dpo.evaluation.sampling import sample
from dpo.training.settings import LoraSettings
from dpo.training.train import train_dpo
from tests.support.logprobs import (
    ARCHITECTURES,
    assert_same_gradients,
    gradients,
    make_rows,
    naive_logps,
    plain_model,
)
from tests.support.models import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BF16_SHARE = 0.05
"""Maximum relative change of a gradient of these tiny models in bf16. A wrong mask changes it far more."""


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def variable_lengths(monkeypatch):
    """Record the calls of variable-length attention."""
    calls, attend = [], attention.variable_length_attention
    monkeypatch.setattr(attention, "variable_length_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    return calls


def logps_and_gradients(model):
    sums = model(pack(make_rows()).to(model.device))
    return sums.detach().cpu(), {name: gradient.cpu() for name, gradient in gradients(model.model, sums).items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fp32_log_probs_and_gradients_equal_the_cpu(kind, tmp_path):
    folder = make_model(kind, tmp_path)
    plain = plain_model(folder)
    naive = naive_logps(plain, make_rows())
    ours, gradient = logps_and_gradients(load_model(folder).to("cuda"))
    torch.testing.assert_close(ours, naive.detach().flatten(), rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradient, gradients(plain, naive), share=1e-4, floor=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"), [*((k, {}) for k in ARCHITECTURES), ("mistral", {"sliding_window": 6})]
)
def test_bf16_uses_variable_length_attention_and_equals_fp32_up_to_rounding(
    kind, options, compiled, tmp_path, variable_lengths
):
    folder = make_model(kind, tmp_path, **options)
    plain = plain_model(folder)
    naive = naive_logps(plain, make_rows())
    ours, gradient = logps_and_gradients(load_model(folder, "bf16", compiled).to("cuda"))
    assert variable_lengths
    torch.testing.assert_close(ours, naive.detach().flatten(), rtol=3e-3, atol=0.3)
    assert_same_gradients(gradient, gradients(plain, naive), share=BF16_SHARE, floor=BF16_SHARE / 10)


def test_compiled_log_probs_are_equal_in_eval_and_training_mode(llama_dir):
    model = load_model(llama_dir, "bf16", compiled=True).to("cuda")
    cached = sequence_logps(model, make_rows(), 1000).flatten()
    trained, _ = logps_and_gradients(model.train())
    torch.testing.assert_close(trained, cached, rtol=0, atol=0.01)


def test_a_compiled_model_generates_the_same_responses(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = ["short", "a much longer prompt about a film that was long", "short", "x"]
    settings = {"max_new_tokens": 12, "temperature": 1e-5, "seed": 3}
    models = [load_model(tiny_model_dir, "bf16", compiled).to("cuda") for compiled in (False, True)]
    eager, compiled = (sample(model, tokenizer, prompts, **settings) for model in models)
    assert eager == compiled


@pytest.mark.parametrize(
    "changes",
    [
        *({"optimizer": name} for name in ("adamw", "rmsprop", "adamw_8bit", "paged_adamw_8bit")),
        {"lora": LoraSettings(rank=8, alpha=32)},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_compiled_training_lowers_the_loss(tiny_model_dir, changes):
    params, rows = load_params(), make_rows()[:3]
    logps = sequence_logps(load_model(tiny_model_dir), rows, 1000).tolist()
    reference = {row.id: tuple(pair) for row, pair in zip(rows, logps, strict=True)}
    settings = dataclasses.replace(params.dpo, epochs=20, pairs_per_step=3, warmup_ratio=0.0, **changes)
    trial = dataclasses.replace(params.trials()[0], learning_rate=3e-3)
    model = load_model(tiny_model_dir, "bf16", compiled=True)
    steps = train_dpo(model, rows, reference, settings, trial, max_tokens_per_microbatch=1000)
    assert model.device.type == "cuda"
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=0.02)
    assert steps[-1]["loss"] < 0.5
