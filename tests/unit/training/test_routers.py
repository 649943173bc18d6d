"""The load-balancing loss of routers against that of transformers, and in training."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model
from dpo.engine.packing import pack
from dpo.training.routers import RouterLoss, load_balancing_loss
from dpo.training.train import train_dpo, train_sft
from tests.support.logprobs import assert_same_gradients, make_rows
from tests.support.models import make_model
from tests.support.training import LORA, dpo_params, sft_params, trial

MIXTURES = ["qwen3_moe", "mixtral"]
REFERENCE = {row.id: (-20.0, -20.0) for row in make_rows()}


@pytest.mark.parametrize("active", [1, 2, 3])
def test_the_loss_equals_that_of_transformers(active):
    torch.manual_seed(0)
    logits = [torch.randn(tokens, 5, requires_grad=True) for tokens in (7, 7, 7)]
    ours, theirs = load_balancing_loss(logits, active), load_balancing_loss_func(tuple(logits), 5, active)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert load_balancing_loss([torch.eye(5) / 100], 1).item() == pytest.approx(1, abs=1e-3)
    assert load_balancing_loss([torch.eye(5)[:1].repeat(4, 1) * 100], 1).item() == pytest.approx(5)


def balance_of_padded_rows(model, rows):
    """Return the loss of transformers on padded rows, one per completion, with each prompt only in the first."""
    texts = [(row.prompt, completion) for row in rows for completion in row.completions]
    width = max(len(prompt) + len(completion) for prompt, completion in texts)
    ids, mask, counted = (torch.zeros(len(texts), width, dtype=torch.long) for _ in range(3))
    for number, (prompt, completion) in enumerate(texts):
        end = len(prompt) + len(completion)
        ids[number, :end], mask[number, :end] = torch.tensor([*prompt, *completion]), 1
        counted[number, (0 if number % 2 == 0 else len(prompt)) : end] = 1
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    experts = output.router_logits[0].shape[1]
    return load_balancing_loss_func(output.router_logits, experts, model.config.num_experts_per_tok, counted)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_loss_and_gradients_of_padded_rows(architecture, checkpointing, tmp_path):
    folder, rows = make_model(architecture, tmp_path), make_rows()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = balance_of_padded_rows(plain, rows)
    model = load_model(folder).train()
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    router = RouterLoss(model)
    with router:
        logps = model(pack(rows))
        with torch.no_grad():
            model(pack(rows[:1]))
    torch.testing.assert_close(router.value, expected)
    (router.value + 0 * logps.sum()).backward()
    expected.backward()
    named = [dict(each.named_parameters()) for each in (model.model, plain)]
    ours, theirs = ({name: w.grad for name, w in each.items() if w.grad is not None} for each in named)
    zero = {name: torch.zeros_like(gradient) for name, gradient in ours.items()}
    assert_same_gradients(ours, {**zero, **theirs}, share=1e-4)
    value = router.value
    model(pack(rows[:1]))
    assert router.value is value, "the hooks are removed"


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("lora", [None, LORA])
def test_training_adds_the_loss_of_the_routers(architecture, lora, tmp_path):
    folder, rows, logs = make_model(architecture, tmp_path), make_rows(), {}
    for coefficient in (0.0, 0.5):
        params = dpo_params(router_aux_loss=coefficient, lora=lora, epochs=2)
        model = load_model(folder)
        logs[coefficient] = train_dpo(model, rows, REFERENCE, params, trial(), max_tokens_per_microbatch=15)
    without, first = logs[0.0][0], logs[0.5][0]
    assert "router_aux_loss" not in without
    assert 2 < first["router_aux_loss"] < 4, "between equal use and use of the same experts"
    assert first["loss"] == pytest.approx(without["loss"] + 0.5 * first["router_aux_loss"], rel=1e-5)
    assert first["rewards/margins"] == without["rewards/margins"]
    assert first["grad_norm"] != without["grad_norm"]
    model, parts = load_model(folder), []
    router = RouterLoss(model)
    with router:
        for row in rows:
            model(pack([row]))
            parts.append(router.value.item())
    assert first["router_aux_loss"] == pytest.approx(sum(parts) / 4), "each micro-batch counts as its rows"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_large_coefficient_balances_the_experts(precision, tmp_path):
    model = load_model(make_model("mixtral", tmp_path, initializer_range=0.5), precision)
    params = sft_params(router_aux_loss=100.0, epochs=30, learning_rate=1e-2)
    log = train_sft(model, make_rows(), params, max_tokens_per_microbatch=200, seed=0)
    values = [entry["router_aux_loss"] for entry in log]
    print(values)
    assert values[0] > 2.1
    assert sum(values[-5:]) / 5 < 2 + (values[0] - 2) / 2


def test_models_without_routers_and_unsupported_settings_are_refused(tmp_path):
    params = dpo_params(router_aux_loss=0.1)
    model = load_model(make_model("llama", tmp_path / "llama"))
    with pytest.raises(InputError, match="router_aux_loss: a model of type 'llama' has no experts"):
        train_dpo(model, make_rows(), REFERENCE, params, trial(), max_tokens_per_microbatch=100)
    model = load_model(make_model("mixtral", tmp_path / "mixtral"))
    model.compiled = True
    with pytest.raises(InputError, match=r"does not work with engine\.compile"):
        RouterLoss(model)
    model.compiled = model.in_stream = False
    with pytest.raises(InputError, match="not supported for MixtralForCausalLM"):
        RouterLoss(model)
