"""Bytes that a model keeps for a batch of pairs, and those of its weights."""

import torch

from dpo.engine.packing import pack
from dpo.engine.tokenization import TokenRow
from dpo.planner import Pair

PAIR, PAIRS = Pair(prompt=24, completion=16), 8
TOKENS = PAIRS * PAIR.tokens


def kept_bytes(model):
    """Return the bytes that a forward pass keeps for its backward pass, without parameters."""
    draw = torch.Generator().manual_seed(0)
    lengths = (PAIR.prompt, PAIR.completion, PAIR.completion)
    rows = []
    for number in range(PAIRS):
        prompt, *completions = (tuple(torch.randint(512, (n,), generator=draw).tolist()) for n in lengths)
        rows.append(TokenRow(str(number), prompt, tuple(completions)))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        model(pack(rows))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def held_bytes(model):
    """Return the bytes of all weights, with the scales of NF4."""
    held = 0
    for weight in model.parameters():
        held += weight.numel() * weight.element_size()
        state = getattr(weight, "quant_state", None)
        if state is not None:
            scales = [state.absmax, state.state2.absmax]
            held += sum(scale.numel() * scale.element_size() for scale in scales)
    return held
