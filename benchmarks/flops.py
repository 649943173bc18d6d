"""FLOPs that a case requires, and how many TRL's layout computes."""

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Case, padded_batches
from dpo.engine.flops import attended, cost_of, forward_flops, shape_of
from dpo.engine.settings import GPU_HEAD_CHUNK, HEAD_CHUNK
from dpo.engine.tokenization import TokenRow


def flops(case: Case, rows: Sequence[TokenRow], config: Any) -> float:
    """Return the FLOPs that `rows` require in a Llama, independent of the implementation.

    The layers process each prompt once and both completions, the vocabulary projection processes completion tokens
    only, and attention processes the unmasked (query, key) pairs. Training takes three times the forward pass: the
    pass itself, the gradient of the activations and the gradient of the weights. LoRA needs the last for attention
    only. Recomputation is not counted.
    """
    cost = cost_of(rows, config, "trained" if case.train else "scored", lora=case.lora)
    assert cost.flops is not None
    return cost.flops


def flop_ratio(case: Case, rows: Sequence[TokenRow], config: Any) -> float:
    """Return TRL's FLOPs divided by ours: the speed ratio of two equally efficient programs.

    TRL processes the prompt with each completion of a pair, padded to the longest of the micro-batch. On a GPU it
    projects completion tokens to the vocabulary, on a CPU every padded position. Its backward pass repeats that
    projection (TRL 1.16, `add_fused_lm_head` and `ChunkedLogProbFunction`). Our side computes `flops`; if the head
    is trained, it repeats the projection of all chunks of a micro-batch except the last. Gradient checkpointing
    processes the layers a second time.
    """
    shape, sizes = shape_of(config), padded_batches(case, rows)
    padded = sum(count * length for count, length in sizes)
    completions = sum(row.completion_tokens for row in rows)
    projected = completions if case.gpu else padded
    forward = forward_flops(shape, padded, projected, sum(count * length**2 for count, length in sizes))
    layers, head, attention = forward
    theirs = _passes(case, *forward)
    theirs += case.train * (head + (layers + attention if case.checkpointing else 0))
    batches = [rows[i : i + case.micro_batch] for i in range(0, len(rows), case.micro_batch)]
    scored = [sum(row.completion_tokens for row in batch) for batch in batches]
    chunk = GPU_HEAD_CHUNK if case.gpu else HEAD_CHUNK
    again = sum((positions - 1) // chunk * chunk for positions in scored)
    trained_head = case.train and not case.lora
    ours = flops(case, rows, config) + trained_head * forward_flops(shape, 0, again, 0)[1]
    if case.ours_checkpointing:
        seen = sum(map(attended, rows))
        layers, _, attention = forward_flops(shape, sum(row.tokens for row in rows), 0, seen)
        ours += layers + attention
    return theirs / ours


def _passes(case: Case, layers: int, head: int, attention: int) -> int:
    products = (2 if case.lora else 3) if case.train else 1
    return products * (layers + head) + (3 if case.train else 1) * attention
