"""Optimizers and learning rate schedules by the names in `params.yaml`."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dpo.common.errors import InputError


def create_optimizer(name: str, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Create an optimizer of the trainable weights without weight decay. The loop sets its learning rate.

    Updates of bf16 weights are rounded with random numbers of `seed`.

    Raises:
        InputError: bitsandbytes, which has the 8-bit optimizers, does not support the device, or the device cannot
            round bf16 weights.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if any(weight.dtype == torch.bfloat16 for weight in weights):
        return RoundingAdamW(weights, seed)
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


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW with fp32 states, whose updates of bf16 weights are rounded stochastically.

    An update is computed in fp32. The random numbers depend only on the seed and on the number of the step, so
    that a resumed training and all processes of a training round alike. Weights in fp32 are updated as by `AdamW`.

    Raises:
        InputError: the device cannot round.
    """

    def __init__(self, weights: list[nn.Parameter], seed: int) -> None:
        super().__init__(weights, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})
        self.seed, self.device = seed, weights[0].device
        try:
            round_to_bf16(torch.ones(1, device=self.device), torch.Generator(self.device))
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"params.yaml: weights: bf16 is not supported on the device '{self.device.type}' ({error}); set "
                "it to fp32"
            ) from error

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by one step."""
        generator = None
        for group in self.param_groups:
            for weight in (each for each in group["params"] if each.grad is not None):
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros((), device=weight.device)
                    state |= {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("mean", "square")}
                value = weight.float()  # the weight itself, if it is in fp32
                adamw(
                    [value], [weight.grad.float()], [state["mean"]], [state["square"]], [], [state["step"]],
                    fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                    weight_decay=0.0, eps=group["eps"], maximize=False,
                )  # fmt: skip
                if weight.dtype == torch.bfloat16:
                    generator = generator or self._generator(int(state["step"]))
                    weight.copy_(round_to_bf16(value, generator))

    def _generator(self, step: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, step]).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(seed))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states in fp32. The base class would round them to the data type of the weights."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, saved in state_dict["state"].items():
            device = weights[number].device
            self.state[weights[number]] = {name: value.to(device, copy=True) for name, value in saved.items()}


def round_to_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return finite fp32 `values` rounded to one of the two nearest bf16 numbers, equal to the value in the mean.

    bf16 is the upper half of fp32. A uniform random number below 2^16 is added to the bits, and the lower half is
    set to 0, so that the probability of each neighbour is linear in the distance to the other.
    """
    bits = torch.randint(2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits += values.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)


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
