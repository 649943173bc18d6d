"""Mixtures of experts: the products of their experts in bf16, and the weights of experts and routers by name.

transformers holds the matrices of all experts of a layer in one tensor per projection and multiplies them by a
grouped product, which autocast of torch does not know. This module registers it with autocast.
"""

import logging

import torch
import transformers.integrations.moe  # noqa: F401  (defines transformers::grouped_mm_fallback)
from torch import Tensor, nn
from transformers import PreTrainedModel

GROUPED_PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")

for _name in GROUPED_PRODUCTS:
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(_name, _device, torch.bfloat16)


log = logging.getLogger(__name__)


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the stacked matrices of all experts, of three dimensions, by name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel"):  # set by `use_experts_implementation` of transformers
            weights = module.named_parameters(path, recurse=False)
            found |= {name: weight for name, weight in weights if weight.dim() == 3}
    return found


def adapted_by_default(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the names of the linear layers, and of the matrices of experts, that get adapters in a mixture.

    These are all but the output and the routers. The names are the last parts, which are equal in all layers.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    layers = LoraConfig(target_modules=[name.rpartition(".")[2] for name in _linear_layers(model)])
    convert_peft_config_for_transformers(layers, model, None)  # it removes names that it takes for experts
    matrices = {".".join(name.split(".")[-2:]) for name in expert_weights(model)}
    return sorted(set(layers.target_modules or ())), sorted(matrices)


def log_layers_left_out(model: PreTrainedModel) -> None:
    """Log the linear layers without adapter: peft takes `gate_proj` of a dense layer for that of the experts."""
    left = [name for name in _linear_layers(model) if ".base_layer" not in name and ".lora_" not in name]
    if left:
        log.warning("%s: %d linear layers, such as %s, get no adapter", type(model).__name__, len(left), left[0])


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers of a mixture except the output and the routers."""
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    return [name for name in linear if not _is_router(name)]


def _is_router(name: str) -> bool:
    """Return whether a module is, or is part of, a router or the gate of a shared expert."""
    return any(part.rpartition("_")[2] in ("gate", "router") for part in name.split("."))
