"""Products of fp32 matrices on a CPU by oneDNN, a part of torch.

`F.linear` uses MKL for them. oneDNN computes the same sums in fp32 in another order, and is faster for the shapes
of language models.
"""

import os
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN and torch each keep what they prepared for a shape, about 2 MB, by default for 1024 shapes.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(inputs, weight, bias)`, without a graph for gradients in fp32 on a CPU."""
    if _is_for_onednn(inputs, weight):
        with suppress(RuntimeError):  # oneDNN lacks memory for its copy of the weight, or F.linear fails too
            return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return F.linear(inputs, weight, bias)


class OneDnnLinear(nn.Linear):
    """A linear layer whose products are computed by oneDNN where `linear` does."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the products with the weight of the layer."""
        if torch.is_grad_enabled() and _is_for_onednn(input, self.weight):
            return _Linear.apply(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a model use oneDNN in training and evaluation, except those of adapters.

    Adapters are added before or after this call, so none of their layers use it.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ".lora_" not in name:
            module.__class__ = OneDnnLinear  # a new `forward` of the object would keep the model from being freed


def _is_for_onednn(inputs: Tensor, weight: Tensor) -> bool:
    is_fp32 = inputs.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_fp32 and inputs.device.type == "cpu" and torch.backends.mkldnn.is_available()


class _Linear(torch.autograd.Function):
    """A linear layer. The gradient of the weight is a product by MKL, which is faster there."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.T) if needs_inputs else None,
            rows.T @ inputs.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
