"""Activations in host memory between the forward and the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """Copy the hidden states [1, T, width] that are kept inside the block to host memory, until they are used.

    With gradient checkpointing these are the inputs of the layers. Weights and smaller tensors stay.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.dim() != 3 or not tensor.requires_grad or tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor.detach(), non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
