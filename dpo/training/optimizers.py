"""Optimizers and learning rate schedules by the names in `params.yaml`."""

import math

import torch
from torch import nn

from dpo.common.errors import InputError


def create_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Create an optimizer of the trainable weights without weight decay. The loop sets its learning rate.

    Raises:
        InputError: bitsandbytes, which has the 8-bit optimizers, does not support the device.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    if name == "rmsprop":
        return torch.optim.RMSprop(weights)
    import bitsandbytes

    device = weights[0].device.type
    if device not in bitsandbytes.supported_torch_devices:
        raise InputError(f"params.yaml: optimizer '{name}' does not support the device '{device}'; choose adamw")
    is_paged = name == "paged_adamw_8bit"
    optimizer = bitsandbytes.optim.AdamW(weights, weight_decay=0.0, optim_bits=8, is_paged=is_paged)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # 8-bit states of rarely used embeddings are inexact
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def schedule_factor(decay: str, warmup_ratio: float, step: int, steps: int) -> float:
    """Return the learning rate of `step`, counted from 0, as a share of the peak.

    With n steps and w = floor(warmup_ratio * n) warm-up steps, step t has the factor

    - (t + 1) / (w + 1) for t < w, so that the first step already trains,
    - 1 for `constant`, 1 - s for `linear`, (1 + cos(pi s)) / 2 for `cosine` (Loshchilov and Hutter 2017, "SGDR",
      eq. 5) for t >= w, with s = (t - w) / (n - w). It would reach 0 one step after the last.
    """
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]
