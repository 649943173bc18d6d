"""Mixtures of experts: the data type of their products, and which of their weights have adapters by default."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dpo.engine.experts import GROUPED_PRODUCTS, expert_weights
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.packing import pack
from tests.support.logprobs import make_rows
from tests.support.models import make_model

MIXTURES = ["qwen3_moe", "mixtral"]


class Products(TorchDispatchMode):
    """Records the data types of inputs, weights and results of grouped products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name in GROUPED_PRODUCTS:
            self.dtypes.add((args[0].dtype, args[1].dtype, result.dtype))
        return result


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_multiplied_in_the_precision_of_the_engine(architecture, precision, tmp_path):
    folder, dtype = make_model(architecture, tmp_path), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for frozen in (False, True):
        model = load_model(folder, precision, frozen=frozen).train()
        model.model.requires_grad_(not frozen)
        with Products() as forward:
            total = model(pack(make_rows())).sum()
        assert forward.dtypes == {(dtype,) * 3}
        weights = expert_weights(model.model)
        assert len(weights) == 4, "two matrices of two layers"
        assert {weight.dtype for weight in weights.values()} == {dtype if frozen else torch.float32}
        if not frozen:
            with Products() as backward:
                total.backward()
            assert backward.dtypes == {(dtype,) * 3}
            assert {weight.grad.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_log_probs_in_bf16_agree_with_fp32_within_rounding(architecture, tmp_path):
    """All experts are active, because rounding can change which ones a router chooses."""
    folder, rows = make_model(architecture, tmp_path, num_experts_per_tok=4), make_rows()
    exact, rounded = (sequence_logps(load_model(folder, precision), rows, 1000) for precision in ("fp32", "bf16"))
    assert (exact - rounded).abs().max() > 1e-4
    torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=2**-4)


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_every_implementation_of_experts_rounds_inputs_and_weights(architecture, implementation, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture, tmp_path), dtype=torch.float32)
    model.set_experts_implementation(implementation)
    torch.manual_seed(0)
    experts = next(module for module in model.modules() if hasattr(module, "_is_expert_parallel"))
    routing = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.full((3, 2), 0.5)
    states = torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        result = experts(states, *routing)
        held = copy.deepcopy(experts).bfloat16()(states, *routing)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        exact = copy.deepcopy(experts).double()(states.double(), routing[0], routing[1].double())
    assert torch.equal(result, held)
    assert 1e-4 < (result - exact).norm() / exact.norm() < 2**-7


@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_self_check_of_weights_in_bf16_computes_in_fp32(architecture, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(architecture, tmp_path / "random"))
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    with Products() as products:
        model = load_model(tmp_path / "bf16", "bf16", frozen=True)
    assert {weight.dtype for weight in expert_weights(model.model).values()} == {torch.bfloat16}
    assert products.dtypes == {(torch.float32,) * 3}
    assert model.in_stream
