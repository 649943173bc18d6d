"""Optimizers by the names in `params.yaml`. None of them decays weights."""

from typing import Any

import torch
from torch import nn

from dpo.common.errors import InputError


def create_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Create an optimizer of the trainable weights. The training loop sets the learning rate before each step.

    Raises:
        InputError: an 8-bit optimizer lacks a CUDA GPU or the package bitsandbytes.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    if name == "adamw":
        return torch.optim.AdamW(weights, **adam, fused=True)
    if name == "rmsprop":
        return torch.optim.RMSprop(weights)
    if not torch.cuda.is_available():
        raise InputError(f"params.yaml: optimizer '{name}' needs a CUDA GPU; choose adamw or rmsprop")
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(f"params.yaml: optimizer '{name}' needs `pip install bitsandbytes`") from error
    optimizer = bitsandbytes.optim.AdamW(weights, **adam, optim_bits=8, is_paged=name == "paged_adamw_8bit")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # 8-bit states of rarely used embeddings are inexact
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
