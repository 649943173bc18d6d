"""Compare the planner's predictions with measured memory and time on this machine: `python -m benchmarks.planner`.

Each case trains the base model with `dpo.training.train` in its own process, with two micro-batches per step and
the allocator settings of the stages. Memory is peak resident memory. The planner's overhead is what is resident
after a model with one narrow layer was trained in the same process. Time is the median of the four steps after
the first; the FLOP/s of the first case predict the others. Writes `benchmarks/results/planner.json` and the
tables of `docs/guides/larger-models.md`.
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
from dpo.engine.tokenization import TokenRow
from dpo.planner import LLAMAS, Pair, Setup, pair_flops, seconds, shape_of, training_memory
from dpo.training.settings import LoraSettings
from dpo.training.train import train_dpo
from tasks.commands.plan import GPU_OVERHEAD, TFLOPS, UTILISATION, candidate_setups
from tasks.common.allocator import TRAINING
from tasks.common.paths import BASE

RESULTS, PAGE = Path("benchmarks/results/planner.json"), Path("docs/guides/larger-models.md")
PAIR = Pair(prompt=32, completion=24)
MICRO_BATCHES, STEPS, SEED = 2, 5, 17
CASES = [
    (rank, pairs, checkpointing)
    for rank in (None, 16)
    for pairs, checkpointing in ((4, False), (8, False), (8, True))
]
"""(LoRA rank, pairs per micro-batch, gradient checkpointing)"""
NARROW = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}  # fmt: skip
"""Sizes of a model that needs almost no memory but loads all libraries."""
LARGE, TOKENS, GPUS = Pair(prompt=256, completion=256), 8192, (1, 8, 64)
"""For the table of large models: lengths of a pair, tokens per micro-batch, numbers of GPUs."""


@dataclass(frozen=True)
class Run:
    """One training: bytes of the process without the model and at the peak, and seconds per step."""

    overhead: int
    peak: int
    seconds: float


def measure(model: Path, rank: int | None, pairs: int, checkpointing: bool) -> Run:
    """Train a narrow model, whose memory is the overhead, then `model`, on random tokens."""
    params = load_params()
    draw = np.random.default_rng(SEED)
    lengths = (PAIR.prompt, PAIR.completion, PAIR.completion)
    count = pairs * MICRO_BATCHES * STEPS
    rows = []
    for number in range(count):
        prompt, *completions = (tuple(draw.integers(4, 300, length).tolist()) for length in lengths)
        rows.append(TokenRow(str(number), prompt, tuple(completions)))
    training = dataclasses.replace(
        params.dpo,
        epochs=1,
        pairs_per_step=pairs * MICRO_BATCHES,
        optimizer="adamw",
        gradient_checkpointing=checkpointing,
        lora=None if rank is None else LoraSettings(rank=rank, alpha=2 * rank),
        early_stop=None,
    )

    def seconds_per_step(path: Path) -> float:
        clock = Clock()
        train_dpo(
            load_model(path), rows, {row.id: (-100.0, -100.0) for row in rows}, training, params.trials()[0],
            max_tokens_per_microbatch=pairs * PAIR.tokens, callbacks=[clock],
        )  # fmt: skip
        return statistics.median(np.diff(clock.ends))

    with TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, **NARROW)).save_pretrained(folder)
        seconds_per_step(Path(folder))
    overhead, step = resident(), seconds_per_step(model)
    return Run(overhead, peak(), step)


def main() -> None:
    """Measure, compare and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--model", type=Path, default=BASE)
    parser.add_argument("--table", action="store_true", help="do not measure; write the page")
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
    """Return predictions and measurements as a Markdown table."""
    lines = [
        "| training | checkpointing | tokens per micro-batch | peak, GiB | planned, GiB (ratio) | step, s "
        "| planned, s (ratio) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        time = f"{r['predicted_seconds']:.1f} ({r['predicted_seconds'] / r['seconds']:.2f})"
        cells = [
            "all weights" if r["lora_rank"] is None else f"LoRA, rank {r['lora_rank']}",
            "on" if r["gradient_checkpointing"] else "off",
            f"{r['tokens']:,}",
            f"{r['peak'] / 2**30:.2f}",
            f"{r['predicted_peak'] / 2**30:.2f} ({r['predicted_peak'] / r['peak']:.2f})",
            f"{r['seconds']:.1f}",
            "" if r is results[0] else time,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shapes() -> str:
    """Return a Markdown table of three Llamas in bf16: GiB per GPU by number of GPUs, with FSDP on several."""
    params = load_params()
    engine = dataclasses.replace(params.engine, precision="bf16", max_tokens_per_microbatch=TOKENS)
    dpo = dataclasses.replace(params.dpo, optimizer="adamw", pairs_per_step=64, lora=None)
    params = dataclasses.replace(params, engine=engine, dpo=dpo)
    lines = [
        "| model | training | checkpointing | "
        + " | ".join(f"GiB per GPU, {gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)
        + " | GPU-hours per 100,000 pairs |",
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
