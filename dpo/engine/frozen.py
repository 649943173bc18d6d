"""Less memory for weights that are not trained: bf16, or NF4 by bitsandbytes.

Under `precision: bf16`, matrices of the layers are rounded to bf16 for every product. Weights that are not trained
are held in bf16 instead, with the same results. NF4 (Dettmers et al. 2023, "QLoRA") holds 4 bits per weight, with
the scales of each block of 64 weights quantised too.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.engine.experts import expert_weights
from dpo.engine.pretrained import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_base,
    checkpoint_dtype,
    load_adapter,
    load_weights,
)
from dpo.engine.products import OneDnnLinear

log = logging.getLogger(__name__)


def nf4_options() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise the linear layers except the output to NF4.

    Products are computed in fp32 until `multiply_in_bf16` is called.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": this_process().device}}


def is_quantised(model: nn.Module) -> bool:
    """Return whether a model has weights in NF4."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def log_experts_left_out(model: PreTrainedModel) -> None:
    """Log that NF4 does not apply to the experts of a quantised mixture, which are no linear layers."""
    experts = sum(weight.numel() for weight in expert_weights(model).values())
    if experts and is_quantised(model):
        log.warning(
            "engine.quantization: nf4 does not apply to the experts of %s: %s parameters keep the data type of "
            "engine.precision",
            *(type(model).__name__, f"{experts:,}"),
        )


def use_one_product(model: PreTrainedModel) -> None:
    """Multiply NF4 weights in evaluation as in training, so that the margin at step 0 is exactly 0.

    On CPUs with AVX512-BF16, bitsandbytes would use another layout and another product in evaluation.
    """
    for module in _quantised_layers(model):
        module.support_avx512bf16_for_cpu = False


def multiply_in_bf16(model: PreTrainedModel) -> None:
    """Compute products of NF4 weights in bf16, as autocast does with other weights."""
    for module in _quantised_layers(model):
        module.compute_dtype = torch.bfloat16
        # The result has the dtype of the input, so the input is rounded first.
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))


def _quantised_layers(model: PreTrainedModel) -> list[Any]:
    if not is_quantised(model):
        return []
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def load_in_bf16(folder: Path) -> PreTrainedModel | None:
    """Load a model like `load_causal_lm`, but with linear layers in bf16. Return None if that would change values.

    It changes none if the checkpoint is in bf16. Biases of these layers are in bf16 too. All other weights and
    adapters are in fp32.
    """
    is_adapter, has_model = (folder / ADAPTER_CONFIG).is_file(), (folder / "config.json").is_file()
    base, revision = adapter_base(folder) if is_adapter and not has_model else (folder, None)
    if checkpoint_dtype(base, revision) != "bfloat16":
        return None
    model: PreTrainedModel = load_weights(AutoModelForCausalLM, base, revision, dtype="bfloat16")
    if any(buffer.dtype == torch.bfloat16 for buffer in model.buffers()):  # they were computed in bf16
        return None
    layers = {id(weight) for weight in _linear_weights(model)}
    for name, weight in model.named_parameters():
        if id(weight) not in layers or ADAPTER in name.split("."):
            weight.data = weight.data.float()
    if is_adapter:  # also if it is loaded already: its values were rounded
        load_adapter(model, folder)
    return model


class ProductsInFp32(TorchFunctionMode):
    """Inside the block, linear layers and experts with weights in bf16 compute in fp32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast tensors in bf16 before a product."""
        if function in (F.linear, torch.addmm, torch._grouped_mm):
            args = [each.float() if isinstance(each, Tensor) else each for each in args]
        return function(*args, **(kwargs or {}))


def hold_frozen_in_bf16(model: PreTrainedModel, *, vocabulary: bool) -> None:
    """Round weights of linear layers and experts that require no gradient to bf16; with `vocabulary`, that too.

    Biases of linear layers are rounded too. Norms, embeddings and the projection to the vocabulary stay in fp32.

    Raises:
        InputError: `vocabulary` is set, and the embedding is not a plain one or is trained.
    """
    round_linear_layers(model, trained=False)
    if not vocabulary:
        return
    head = model.get_output_embeddings()
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or table.weight.requires_grad or head.weight.requires_grad:
        reason = "is trained" if type(table) is nn.Embedding else f"is a {type(table).__name__}"
        raise InputError(
            f"params.yaml: engine.vocabulary: bf16: the embedding of {type(model).__name__} {reason}, which is "
            "not supported; set it to fp32"
        )
    _round(head.weight)
    _round(table.weight)
    table.register_forward_hook(lambda module, inputs, output: output.float())


def round_linear_layers(model: PreTrainedModel, *, trained: bool) -> None:
    """Round fp32 weights of linear layers and experts that are or are not trained to bf16, in place."""
    for weight in _linear_weights(model):
        if weight.requires_grad == trained:
            _round(weight)


def _linear_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield weights and biases of the linear layers except the output, and the matrices of experts."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) in (nn.Linear, OneDnnLinear, Conv1D) and module is not head:
            yield from module.parameters(recurse=False)
    yield from expert_weights(model).values()


def _round(weight: Tensor) -> None:
    if weight.dtype == torch.float32:
        weight.data = weight.data.to(torch.bfloat16)
