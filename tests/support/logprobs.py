"""Log-probs and gradients by a plain forward pass, one completion at a time."""

import random

import torch
from transformers import AutoModelForCausalLM

from dpo.engine.packing import TokenRow
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
]


def tokens(length, seed):
    return tuple(random.Random(seed).choices(range(3, TINY["vocab_size"]), k=length))


def make_rows():
    """Pairs of unequal lengths, among them one-token prompts and completions and a prefix of the other one."""
    long = tokens(12, 1)
    return [
        TokenRow("usual", tokens(9, 2), (tokens(7, 3), tokens(4, 4))),
        TokenRow("short", tokens(1, 5), (tokens(1, 6), tokens(30, 7))),
        TokenRow("prefix", tokens(5, 8), (long[:4], long)),
        TokenRow("same", tokens(3, 9), (tokens(6, 10), tokens(6, 10))),
    ]


def naive_logps(model, rows):
    """log pi(y|x) of each completion: a forward pass of its own, a softmax and a sum token by token."""
    sums = []
    for row in rows:
        for completion in row.completions:
            table = model(input_ids=torch.tensor([[*row.prompt, *completion]])).logits[0].log_softmax(1)
            total = torch.zeros(())
            for place, token in enumerate(completion, start=len(row.prompt)):
                total = total + table[place - 1, token]
            sums.append(total)
    return torch.stack(sums).view(len(rows), -1)


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def gradients(model, sums):
    """Of a sum with another weight for each completion, so that no two of them can be mixed up unnoticed."""
    model.zero_grad()
    (sums.flatten() * torch.arange(1, sums.numel() + 1, device=sums.device)).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def assert_same_gradients(ours, expected, share=1e-5, floor=1e-7):
    """Equal but for rounding, measured against the largest gradient (some are zero but for rounding)."""
    assert ours.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= share * gradient.norm() + floor * largest, name
