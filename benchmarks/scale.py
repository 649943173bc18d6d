"""Planned memory, time and communication of training at four sizes, with weights sharded over all GPUs.

    python -m benchmarks.scale    # writes the tables of docs/internals/scaling.md

A GPU receives every shard of the others twice per micro-batch, for the forward and the backward pass, and reduces
the gradients of the trained weights once. Communication is these bytes at a fixed rate, without overlap.
"""

import dataclasses
import math
from pathlib import Path

from benchmarks.page import put_table
from benchmarks.planner import LARGE, TOKENS
from dpo.engine.flops import Shape
from dpo.engine.settings import GPU_HEAD_CHUNK
from dpo.planner import (
    LLAMAS,
    Pair,
    Setup,
    frozen_weights,
    pair_flops,
    seconds,
    trained_parameters,
    training_memory,
)
from tasks.commands.plan import TFLOPS, UTILISATION
from tasks.common.memory import GPU_OVERHEAD

PAGE = Path("docs/internals/scaling.md")
LLAMA_405B = Shape(126, 16384, 53248, 128, 8, 128, 128256, tied=False)
"""Llama 3.1 405B (Grattafiori et al. 2024, table 3)."""
CASES: list[tuple[str, Shape, int]] = [
    ("llama-1b", LLAMAS["llama-1b"], 1),
    ("llama-8b", LLAMAS["llama-8b"], 8),
    ("llama-70b", LLAMAS["llama-70b"], 64),
    ("llama-405b", LLAMA_405B, 512),
]
PAIRS, BYTES_PER_SECOND = 100_000, 50e9


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Published facts of a DPO training with all weights. None was not found."""

    name: str
    shape: Shape
    gpus: int
    pairs_per_step: int
    pairs: int | None
    hours: float | None


RECIPES = (
    Recipe("OLMo 2 1B (planned as llama-1b)", LLAMAS["llama-1b"], 8, 128, None, 2),
    Recipe("Tulu 3 70B", LLAMAS["llama-70b"], 64, 128, 334_367, None),
    Recipe("Tulu 3 405B", LLAMA_405B, 256, 256, None, None),
)
"""docs/tulu3.md and docs/olmo2.md of github.com/allenai/open-instruct at commit e6c3044: GPUs, pairs per step and
hours. The pairs of 70B: the card of the data set allenai/llama-3.1-tulu-3-70b-preference-mixture."""
LONGEST = Pair(prompt=1024, completion=1024)
"""A pair at the limit of these recipes, 2,048 tokens for prompt and completion, half of them the prompt."""


def communication(shape: Shape, setup: Setup) -> float:
    """Return the bytes that a GPU receives per micro-batch."""
    trained = 4 * trained_parameters(shape, setup.lora_rank)
    held = trained if setup.lora_rank is None else trained + frozen_weights(shape, setup)
    return (2 * held + trained) * (setup.gpus - 1) / setup.gpus


def table() -> str:
    """Return the table of all sizes, with all weights and with LoRA."""
    lines = [
        "| model | GPUs | training | GiB per GPU | GPU-hours per epoch | hours per epoch | communication, h |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    bf16, tf32, _ = (peak * 1e12 * UTILISATION for peak in TFLOPS)
    for name, shape, gpus in CASES:
        whole = Setup(
            max_tokens_per_microbatch=TOKENS, precision="bf16", gradient_checkpointing=True, gpus=gpus,
            sharding="none" if gpus == 1 else "full", head_chunk=GPU_HEAD_CHUNK,
        )  # fmt: skip
        for setup in (whole, dataclasses.replace(whole, lora_rank=16)):
            memory = training_memory(shape, LARGE, setup, GPU_OVERHEAD).total / 2**30
            compute = PAIRS * seconds(pair_flops(shape, LARGE, setup), 1, (bf16, tf32)) / 3600
            passes = PAIRS * LARGE.tokens / TOKENS / gpus
            sent = passes * communication(shape, setup) / BYTES_PER_SECOND / 3600
            kind = "all weights" if setup.lora_rank is None else f"LoRA, rank {setup.lora_rank}"
            cells = [name, f"{gpus}", kind, f"{memory:.0f}", f"{compute:.3g}", f"{compute / gpus + sent:.2g}"]
            lines.append("| " + " | ".join([*cells, f"{sent:.2g}"]) + " |")
    return "\n".join(lines)


def recipes() -> str:
    """Return the table of published recipes beside the plan."""
    lines = [
        "| recipe | GPUs | pairs per step | pairs | published, h | planned, GiB per GPU, longest pairs | "
        "planned, h per 100,000 pairs (of it communication) | the same, longest pairs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for recipe in RECIPES:
        memory, hours = 0.0, []
        for pair in (LARGE, LONGEST):
            memory, compute, sent = planned(recipe, pair)
            hours.append(f"{compute + sent:.2g} ({sent:.2g})")
        facts = [f"{recipe.gpus}", f"{recipe.pairs_per_step}", _known(recipe.pairs), _known(recipe.hours)]
        lines.append("| " + " | ".join([recipe.name, *facts, f"{memory / 2**30:.0f}", *hours]) + " |")
    return "\n".join(lines)


def _known(fact: float | None) -> str:
    return "not found" if fact is None else f"{fact:,}"


def planned(recipe: Recipe, pair: Pair) -> tuple[float, float, float]:
    """Return peak bytes per GPU, and the hours of computation and of communication for `PAIRS` pairs."""
    tokens = recipe.pairs_per_step // recipe.gpus * pair.tokens
    micro_batches = math.ceil(tokens / TOKENS)
    setup = Setup(
        max_tokens_per_microbatch=min(tokens, TOKENS), precision="bf16", gradient_checkpointing=True,
        accumulates=micro_batches > 1, sharding="full", gpus=recipe.gpus, head_chunk=GPU_HEAD_CHUNK,
    )  # fmt: skip
    bf16, tf32, _ = (peak * 1e12 * UTILISATION for peak in TFLOPS)
    compute = PAIRS * seconds(pair_flops(recipe.shape, pair, setup), recipe.gpus, (bf16, tf32)) / 3600
    passes = PAIRS / recipe.pairs_per_step * micro_batches
    sent = passes * communication(recipe.shape, setup) / BYTES_PER_SECOND / 3600
    return training_memory(recipe.shape, pair, setup, GPU_OVERHEAD).total, compute, sent


if __name__ == "__main__":
    put_table(PAGE, "scale", table())
    put_table(PAGE, "recipes", recipes())
