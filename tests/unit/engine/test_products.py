"""Products by oneDNN are those of F.linear, in float64 within rounding, with gradients."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpo.engine.logprobs import load_model
from dpo.engine.products import OneDnnLinear, linear, use_onednn
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora
from tests.support.models import make_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def layer(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias)
    use_onednn(nn.Sequential(made))
    assert type(made) is OneDnnLinear
    return made


def test_a_model_is_freed_without_garbage_collection(tmp_path):
    gc.collect()
    gc.disable()
    try:
        model = load_model(make_model("llama", tmp_path / "model"))
        freed = weakref.ref(model.get_output_embeddings().weight)
        del model
        assert freed() is None, "stages collect garbage rarely, and rounds load several models"
    finally:
        gc.enable()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 300), (3, 2, 5)])
def test_a_product_and_its_gradients_are_those_of_float64(shape, bias):
    module = layer(48, 80, bias)
    exact = nn.Linear(48, 80, bias, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    inputs = torch.randn(*shape, 48)
    found, expected = [], []
    for used, values, results in ((module, inputs, found), (exact, inputs.double(), expected)):
        values = values.clone().requires_grad_()
        output = used(values)
        (output * torch.linspace(-1, 1, 80).to(output)).sum().backward()
        results += [output, values.grad, *(weight.grad for weight in used.parameters())]
    assert output.shape == (*shape, 80)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    module = layer(16, 8, True).requires_grad_(False)
    inputs = torch.randn(4, 16, requires_grad=True)
    module(inputs).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad is None
    torch.testing.assert_close(inputs.grad, module.weight.sum(0).expand(4, 16))


def test_a_row_does_not_depend_on_the_other_rows():
    weight, rows = torch.randn(96, 64), torch.randn(700, 64)
    whole = linear(rows, weight)
    assert all(torch.equal(linear(rows[:count], weight), whole[:count]) for count in (2, 3, 17, 256, 699))


def test_without_memory_for_onednn_torch_computes_the_product(monkeypatch):
    def fail(*args):
        raise RuntimeError("could not create a primitive")

    inputs, weight = torch.randn(4, 16), torch.randn(8, 16)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fail)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))


def test_other_data_types_are_left_to_torch():
    module, inputs = layer(16, 8, False), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(inputs), F.linear(inputs, module.weight))
        assert module(inputs).dtype == torch.bfloat16
    inputs = inputs.double()
    assert torch.equal(module.double()(inputs), F.linear(inputs, module.weight))


def test_the_layers_of_a_model_but_not_of_adapters_use_it(tmp_path):
    model = load_model(make_model("llama", tmp_path / "model")).model
    add_lora(model, LoraSettings(rank=2, alpha=4))
    use_onednn(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = {name for name, module in layers.items() if type(module) is not OneDnnLinear}
    assert others == {name for name in layers if ".lora_" in name}
    assert "lm_head" in layers
