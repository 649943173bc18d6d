"""The planner's predictions against measured memory and time, on this machine: `python -m benchmarks.planner`.

Every case trains the base model on micro-batches, two a step, with `dpo.training.train`, in a process of its own.

Memory is the peak resident memory, with the allocator that `dvc.yaml` sets for training; its overhead is what is
resident once a model of one narrow layer has been trained the same way. Time is the median of four steps after the
first; the operations a second of the first case predict the others.
Writes `benchmarks/results/planner.json` and the tables of `docs/scale.md`.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import alone, peak, resident
from benchmarks.page import put_table
from benchmarks.trainers import Clock
from dpo.common.files import write_json
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.packing import TokenRow
from dpo.planner import LLAMAS, Pair, Setup, pair_flops, seconds, shape_of, training_memory
from dpo.training.settings import LoraSettings
from dpo.training.train import train_dpo
from tasks.commands.plan import GPU_OVERHEAD, TFLOPS, UTILISATION, candidate_setups
from tasks.common.allocator import TRAINING
from tasks.common.paths import BASE

RESULTS, PAGE = Path("benchmarks/results/planner.json"), Path("docs/scale.md")
PAIR = Pair(prompt=32, completion=24)
MICRO_BATCHES, STEPS, SEED = 2, 5, 17
CASES = [
    (rank, pairs, checkpointing)
    for rank in (None, 16)
    for pairs, checkpointing in ((4, False), (8, False), (8, True))
]
"""(LoRA's rank, pairs in a micro-batch, gradient checkpointing)"""
NARROW = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}  # fmt: skip
"""Sizes of a model that takes next to no memory, while the libraries that train it are all loaded."""
LARGE, TOKENS, GPUS = Pair(prompt=256, completion=256), 8192, (1, 8, 64)
"""Of the table of large models: lengths of a pair, tokens in a micro-batch, numbers of GPUs."""


@dataclass(frozen=True)
class Run:
    """What one training took: bytes of the process without the model and at the peak, seconds of a step."""

    overhead: int
    peak: int
    seconds: float


def measure(model: Path, rank: int | None, pairs: int, checkpointing: bool) -> Run:
    """Train on random tokens, pairs of the lengths of `PAIR`; a narrow model first, for the overhead."""
    params = load_params()
    draw = np.random.default_rng(SEED)
    lengths = (PAIR.prompt, PAIR.completion, PAIR.completion)
    count = pairs * MICRO_BATCHES * STEPS
    rows = []
    for number in range(count):
        prompt, *completions = (tuple(draw.integers(4, 300, length).tolist()) for length in lengths)
        rows.append(TokenRow(str(number), prompt, tuple(completions)))
    asked = dataclasses.replace(
        params.dpo,
        epochs=1,
        pairs_per_step=pairs * MICRO_BATCHES,
        optimizer="adamw",
        gradient_checkpointing=checkpointing,
        lora=None if rank is None else LoraSettings(rank=rank, alpha=2 * rank),
        early_stop=None,
    )

    def seconds_a_step(path: Path) -> float:
        clock = Clock()
        train_dpo(
            load_model(path), rows, {row.id: (-100.0, -100.0) for row in rows}, asked, params.trials()[0],
            max_tokens_per_microbatch=pairs * PAIR.tokens, callbacks=[clock],
        )  # fmt: skip
        return statistics.median(np.diff(clock.ends))

    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, **NARROW)).save_pretrained(folder)
        seconds_a_step(Path(folder))
    overhead, step = resident(), seconds_a_step(model)
    return Run(overhead, peak(), step)


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--model", type=Path, default=BASE)
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the page")
    options = parser.parse_args()
    if options.table:
        results = json.loads(RESULTS.read_text())
    else:
        shape, results = shape_of(AutoConfig.from_pretrained(options.model)), []
        for case in CASES:
            rank, pairs, checkpointing = case
            run = alone(measure, options.model, *case, **TRAINING)
            setup = Setup(pairs * PAIR.tokens, "fp32", rank, checkpointing)
            memory = training_memory(shape, PAIR, setup, run.overhead)
            flops = pairs * MICRO_BATCHES * sum(pair_flops(shape, PAIR, setup))
            rate = results[0]["flops"] / results[0]["seconds"] if results else flops / run.seconds
            results.append(
                {
                    "lora_rank": rank,
                    "pairs": pairs,
                    "tokens": setup.max_tokens_per_microbatch,
                    "gradient_checkpointing": checkpointing,
                    "peak": run.peak,
                    "predicted_peak": memory.total,
                    "memory": dataclasses.asdict(memory),
                    "seconds": run.seconds,
                    "predicted_seconds": flops / rate,
                    "flops": flops,
                    "threads": torch.get_num_threads(),
                }
            )
            sys.stdout.write(measured(results[-1:]) + "\n")
            sys.stdout.flush()
        write_json(RESULTS, results)
    put_table(PAGE, "planner", measured(results))
    put_table(PAGE, "shapes", shapes())


def measured(results: list[dict[str, Any]]) -> str:
    """Predictions beside measurements."""
    lines = [
        "| training | checkpointing | tokens | peak GiB | planned | ratio | s a step | planned | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        cells = [
            "all weights" if r["lora_rank"] is None else f"LoRA, rank {r['lora_rank']}",
            "on" if r["gradient_checkpointing"] else "off",
            f"{r['tokens']:,}",
            f"{r['peak'] / 2**30:.2f}",
            f"{r['predicted_peak'] / 2**30:.2f}",
            f"{r['predicted_peak'] / r['peak']:.2f}",
            f"{r['seconds']:.1f}",
            f"{r['predicted_seconds']:.1f}" if r is not results[0] else "",
            f"{r['predicted_seconds'] / r['seconds']:.2f}" if r is not results[0] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shapes() -> str:
    """Llamas of three sizes in bf16: GiB of a GPU for each number of GPUs, with FSDP on more than one."""
    params = load_params()
    engine = dataclasses.replace(params.engine, precision="bf16", max_tokens_per_microbatch=TOKENS)
    asked = dataclasses.replace(params.dpo, optimizer="adamw", pairs_per_step=64, lora=None)
    params = dataclasses.replace(params, engine=engine, dpo=asked)
    lines = [
        "| model | training | checkpointing | "
        + " | ".join(f"GiB, GPUs: {gpus}" for gpus in GPUS)
        + " | GPU-hours for 100,000 pairs |",
        "| --- | --- | --- |" + " ---: |" * (len(GPUS) + 1),
    ]
    for name, shape in LLAMAS.items():
        setups = zip(
            *(candidate_setups(params, LARGE, gpus, "none" if gpus == 1 else "full") for gpus in GPUS), strict=True
        )
        for each in setups:
            memories = [training_memory(shape, LARGE, setup, GPU_OVERHEAD).total / 2**30 for setup in each]
            bf16, tf32, _ = (peak * 1e12 * UTILISATION for peak in TFLOPS)
            hours = 100_000 * seconds(pair_flops(shape, LARGE, each[0]), 1, (bf16, tf32)) / 3600
            cells = [
                name,
                "all weights" if each[0].lora_rank is None else f"LoRA, rank {each[0].lora_rank}",
                "on" if each[0].gradient_checkpointing else "off",
                *(f"{memory:.0f}" for memory in memories),
                f"{hours:.2g}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
