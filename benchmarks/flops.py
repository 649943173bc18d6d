"""Floating-point operations that a case needs, and what TRL's layout makes of them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Case, padded_batches
from dpo.batching import TokenRow


def flops(case: Case, rows: Sequence[TokenRow], config: Any) -> float:
    """Floating-point operations that `rows` need in a Llama, whatever an implementation does on top.

    The forward pass of each row needs 2 * P * stream tokens (the prompt once, both completions; P: the layers'
    weights, embeddings excluded) + 2 * hidden * vocabulary * completion tokens + 4 * layers * heads * head_dim *
    (query, key) pairs that see each other. Training needs three times as much: the forward pass, the gradient of
    activations, that of weights; LoRA needs the last for attention's products alone. Recomputation counts as
    nothing.
    """
    seen = 0
    for row in rows:
        prompt, *completions = len(row.prompt), *map(len, row.completions)
        seen += sum(n * (n + 1) // 2 for n in (prompt, *completions)) + prompt * sum(completions)
    linear, attention = forward_flops(
        sum(row.tokens for row in rows), sum(row.completion_tokens for row in rows), seen, config
    )
    passes = (2 if case.lora else 3, 3) if case.train else (1, 1)
    return passes[0] * linear + passes[1] * attention


def flop_ratio(case: Case, rows: Sequence[TokenRow], config: Any) -> float:
    """What TRL's layout computes over what ours computes: the speed ratio of two equally efficient programs.

    TRL runs prompt and completion of both sides of a pair, padded to the longest of a micro-batch, through layers
    and vocabulary, with gradient checkpointing twice forward. Ours runs `flops`, and twice forward through the
    vocabulary.
    """
    sizes = padded_batches(case, rows)
    padded = sum(count * length for count, length in sizes)
    linear, attention = forward_flops(padded, padded, sum(count * length**2 for count, length in sizes), config)
    again = int(case.train and case.checkpointing)
    passes = (2 + again if case.lora else 3 + again, 3 + again) if case.train else (1, 1)
    theirs = passes[0] * linear + passes[1] * attention
    ours = flops(case, rows, config)
    if case.train:
        ours += forward_flops(0, sum(row.completion_tokens for row in rows), 0, config)[0]
    return theirs / ours


def forward_flops(tokens: int, projected: int, seen: int, config: Any) -> tuple[int, int]:
    """(linear, attention) operations: `tokens` in the layers, `projected` to the vocabulary, `seen` attended."""
    heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    weights = 2 * hidden * head_dim * (heads + config.num_key_value_heads) + 3 * hidden * config.intermediate_size
    linear = 2 * (layers * weights * tokens + hidden * config.vocab_size * projected)
    return linear, 4 * layers * heads * head_dim * seen
