"""Planned memory, time and communication of training at four sizes, with weights sharded over all GPUs.

    python -m benchmarks.scale    # writes the table of docs/internals/scaling.md

A GPU receives every shard of the others twice per micro-batch, for the forward and the backward pass, and reduces
the gradients of the trained weights once. Communication is these bytes at a fixed rate, without overlap.
"""

import dataclasses
from pathlib import Path

from benchmarks.page import put_table
from benchmarks.planner import LARGE, TOKENS
from dpo.engine.flops import Shape
from dpo.engine.settings import GPU_HEAD_CHUNK
from dpo.planner import (
    LLAMAS,
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


if __name__ == "__main__":
    put_table(PAGE, "scale", table())
