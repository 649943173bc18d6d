"""Log-probs and gradients from plain forward passes, one per completion."""

import random

import torch
from transformers import AutoModelForCausalLM

from dpo.engine.tokenization import TokenRow
from tests.support.models import TINY

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma3",
    "gpt2",
    "phi",
    "phi3",
    "gpt_neox",
    "olmo2",
    "qwen3_moe",
    "mixtral",
]


def tokens(length, seed):
    return tuple(random.Random(seed).choices(range(3, TINY["vocab_size"]), k=length))


def make_rows():
    """Return pairs of different lengths, including one-token parts and a completion that starts the other."""
    long = tokens(12, 1)
    return [
        TokenRow("usual", tokens(9, 2), (tokens(7, 3), tokens(4, 4))),
        TokenRow("short", tokens(1, 5), (tokens(1, 6), tokens(30, 7))),
        TokenRow("prefix", tokens(5, 8), (long[:4], long)),
        TokenRow("same", tokens(3, 9), (tokens(6, 10), tokens(6, 10))),
    ]


def naive_logps(model, rows):
    """Return log pi(y|x) of each completion from one forward pass, a softmax and a sum over tokens."""
    sums = []
    for row in rows:
        for completion in row.completions:
            table = model(input_ids=torch.tensor([[*row.prompt, *completion]])).logits[0].log_softmax(1)
            total = torch.zeros(())
            for position, token in enumerate(completion, start=len(row.prompt)):
                total = total + table[position - 1, token]
            sums.append(total)
    return torch.stack(sums).view(len(rows), -1)


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def gradients(model, sums):
    """Return gradients of a sum with different weights, so that swapped completions are detected."""
    model.zero_grad()
    (sums.flatten() * torch.arange(1, sums.numel() + 1, device=sums.device)).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def assert_same_gradients(ours, expected, share=1e-5, floor=1e-7):
    """Assert equality up to rounding, relative to each gradient and to the largest one, because some are zero."""
    assert ours.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= share * gradient.norm() + floor * largest, name
