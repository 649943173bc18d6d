"""Floating-point operations that a case needs, and what TRL's layout makes of them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Case, padded_batches
from dpo.engine.head import GPU_HEAD_CHUNK, HEAD_CHUNK
from dpo.engine.packing import TokenRow
from dpo.planner import forward_flops, shape_of


def flops(case: Case, rows: Sequence[TokenRow], config: Any) -> float:
    """Floating-point operations that `rows` need in a Llama, whatever an implementation does on top.

    The layers run each prompt once and both completions, the vocabulary projection the completion tokens alone,
    and attention the (query, key) pairs that see each other. Training needs three times the forward pass: itself,
    the gradient of activations, that of weights; LoRA needs the last for attention's products alone.
    Recomputation counts as nothing.
    """
    tokens, scored = sum(row.tokens for row in rows), sum(row.completion_tokens for row in rows)
    return _passes(case, *forward_flops(shape_of(config), tokens, scored, _seen(rows)))


def flop_ratio(case: Case, rows: Sequence[TokenRow], config: Any) -> float:
    """What TRL's layout computes over what ours computes: the speed ratio of two equally efficient programs.

    TRL runs prompt and completion of both sides of a pair, padded to the longest of a micro-batch, through the
    layers. It projects the completion tokens to the vocabulary on a GPU, every padded position elsewhere, and its
    backward pass repeats that projection (TRL 1.16, `add_fused_lm_head` and `ChunkedLogProbFunction`). Ours runs
    `flops`; if the head is trained, it repeats the projection of all chunks of a micro-batch except the last.
    Gradient checkpointing runs the layers of a side a second time.
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
        layers, _, attention = forward_flops(shape, sum(row.tokens for row in rows), 0, _seen(rows))
        ours += layers + attention
    return theirs / ours


def _seen(rows: Sequence[TokenRow]) -> int:
    """(query, key) pairs that see each other."""
    seen = 0
    for row in rows:
        prompt, *completions = len(row.prompt), *map(len, row.completions)
        seen += sum(n * (n + 1) // 2 for n in (prompt, *completions)) + prompt * sum(completions)
    return seen


def _passes(case: Case, layers: int, head: int, attention: int) -> int:
    products = (2 if case.lora else 3) if case.train else 1
    return products * (layers + head) + (3 if case.train else 1) * attention
