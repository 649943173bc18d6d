"""Compare the planner's predictions with measured memory and time on this machine.

    python -m benchmarks.planner                # all cases
    python -m benchmarks.planner --cases 0 3    # some of them; the others keep their results
    python -m benchmarks.planner --table        # only write the tables of docs/guides/larger-models.md

Each case trains a random Llama with `dpo.training.train` in its own process: one thread, two micro-batches per
step and the allocator settings of the stages. The checkpoint is in bf16. Memory is peak resident memory. The
planner's overhead is what is resident after a model with one narrow layer was trained in the same process. Time is
the CPU time of a step, the median of the steps after the first; the FLOP/s of the first case predict the others.
Results are in `benchmarks/results/planner.json`.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import alone, peak, resident
from benchmarks.page import put_table
from dpo.common.files import write_json
from dpo.config import Params, load_params
from dpo.engine.flops import Shape, shape_of
from dpo.engine.logprobs import load_model
from dpo.engine.settings import Precision, Quantization
from dpo.engine.tokenization import TokenRow
from dpo.planner import LLAMAS, Pair, Setup, pair_flops, seconds, training_memory
from dpo.training.callbacks import Callback
from dpo.training.settings import LoraSettings
from dpo.training.train import train_dpo
from tasks.commands.plan import TFLOPS, UTILISATION, candidate_setups
from tasks.common.allocator import TRAINING
from tasks.common.memory import GPU_OVERHEAD, STAGES, Hardware, stage_memory

RESULTS, PAGE = Path("benchmarks/results/planner.json"), Path("docs/guides/larger-models.md")
PAIR = Pair(prompt=32, completion=24)
MICRO_BATCHES, STEPS, SEED = 2, 3, 17
MODEL = LlamaConfig(
    num_hidden_layers=12, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=16384, tie_word_embeddings=True,
)  # fmt: skip
"""The model of all cases: 152 million parameters."""


@dataclass(frozen=True)
class Case:
    """One training."""

    rank: int | None
    """Rank of the adapters; None trains all weights."""
    pairs: int
    """Pairs per micro-batch."""
    checkpointing: bool
    precision: Precision = "fp32"
    quantization: Quantization = None
    weights: Precision = "fp32"

    @property
    def name(self) -> str:
        """The method, for the table."""
        method = "all weights" if self.rank is None else f"LoRA, rank {self.rank}"
        method += " in bf16" if self.weights == "bf16" else ""
        return ", ".join([method, *([self.quantization] if self.quantization else []), self.precision])


CASES = [
    Case(None, 4, False),
    Case(None, 8, False),
    Case(None, 8, True),
    Case(16, 4, False),
    Case(16, 8, False),
    Case(16, 8, True),
    Case(None, 8, True, "bf16"),
    Case(None, 8, True, "bf16", weights="bf16"),
    Case(16, 8, False, "bf16"),
    Case(16, 8, True, "bf16"),
    Case(16, 8, False, "bf16", "nf4"),
    Case(16, 8, True, "bf16", "nf4"),
]
NARROW = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}  # fmt: skip
"""Sizes of a model that needs almost no memory but loads all libraries."""
LARGE, TOKENS, GPUS = Pair(prompt=256, completion=256), 8192, (1, 8, 64)
"""For the table of large models: lengths of a pair, tokens per micro-batch, numbers of GPUs."""


CARDS = {24: 23.5, 48: 47.4, 80: 79.2}
"""GiB that cards of 24, 48 and 80 GB (RTX 4090, RTX 6000 Ada, H100) give to processes."""
SIZES = {name: shape for name, shape in LLAMAS.items() if name != "default"}
LENGTHS = [2**n for n in range(9, 18)]
"""Tokens of a pair: half of them are the prompt, a quarter each completion."""
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all weights": ({}, {"optimizer": "adamw"}),
    "all weights in bf16": ({}, {"optimizer": "adamw", "weights": "bf16"}),
    "all weights, 8-bit optimizer": ({}, {"optimizer": "adamw_8bit"}),
    "LoRA": ({}, {}),
    "LoRA, bf16 vocabulary": ({"vocabulary": "bf16"}, {}),
    "LoRA, offload": ({}, {"gradient_checkpointing": "offload"}),
    "LoRA, NF4": ({"quantization": "nf4"}, {}),
    "LoRA, NF4, bf16 vocabulary": ({"quantization": "nf4", "vocabulary": "bf16"}, {}),
    "LoRA, NF4, offload": ({"quantization": "nf4"}, {"gradient_checkpointing": "offload"}),
}
"""Settings of `engine` and `dpo` in the table of what fits. All have bf16 and gradient checkpointing."""


@dataclass(frozen=True)
class Run:
    """One training: bytes of the process without the model and at the peak, and seconds per step."""

    overhead: int
    peak: int
    seconds: float


class StepTimes(Callback):
    """Records the CPU time of this process at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_log(self, entry: dict[str, float]) -> None:
        """Record the end of a step."""
        if "loss" in entry:
            self.ends.append(time.process_time())


def random_rows(count: int, pair: Pair, limit: int) -> list[TokenRow]:
    """Return pairs of random token ids below `limit`."""
    draw, rows = np.random.default_rng(SEED), []
    for number in range(count):
        lengths = (pair.prompt, pair.completion, pair.completion)
        prompt, *completions = (tuple(draw.integers(4, limit, length).tolist()) for length in lengths)
        rows.append(TokenRow(str(number), prompt, tuple(completions)))
    return rows


def measure(model: Path, case: Case) -> Run:
    """Train a narrow model, whose memory is the overhead, then `model`, on random tokens."""
    params, pairs, rank = load_params(), case.pairs, case.rank
    rows = random_rows(pairs * MICRO_BATCHES * STEPS, PAIR, 300)
    training = dataclasses.replace(
        params.dpo,
        epochs=1,
        pairs_per_step=pairs * MICRO_BATCHES,
        optimizer="adamw",
        weights=case.weights,
        gradient_checkpointing=case.checkpointing,
        lora=None if rank is None else LoraSettings(rank=rank, alpha=2 * rank),
        early_stop=None,
    )

    def seconds_per_step(path: Path) -> float:
        clock = StepTimes()
        frozen = False if rank is None else "base"
        policy = load_model(path, case.precision, quantization=case.quantization, frozen=frozen)
        train_dpo(
            policy, rows, {row.id: (-100.0, -100.0) for row in rows}, training, params.trials()[0],
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers of cases")
    parser.add_argument("--table", action="store_true", help="do not measure; write the page")
    options = parser.parse_args()
    if not options.table:
        with TemporaryDirectory() as folder:
            torch.manual_seed(SEED)
            AutoModelForCausalLM.from_config(MODEL, dtype=torch.bfloat16).save_pretrained(folder)
            for number in options.cases:
                add(CASES[number], alone(measure, Path(folder), CASES[number], **TRAINING, OMP_NUM_THREADS="1"))
    put_table(PAGE, "planner", measured(json.loads(RESULTS.read_text())))
    put_table(PAGE, "shapes", shapes())
    put_table(PAGE, "fits", fits())


def add(case: Case, run: Run) -> None:
    """Write a case to the results. It replaces the earlier result of the same case."""
    facts = dataclasses.asdict(case)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    results = [each for each in results if each["case"] != facts] + [{"case": facts, **dataclasses.asdict(run)}]
    order = [dataclasses.asdict(each) for each in CASES]
    write_json(RESULTS, sorted(results, key=lambda each: order.index(each["case"])))


def measured(results: list[dict[str, Any]]) -> str:
    """Return predictions and measurements as a Markdown table."""
    lines = [
        "| training | checkpointing | tokens per micro-batch | peak, GiB | planned, GiB (ratio) | step, CPU s "
        "| planned, CPU s (ratio) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    shape, rate = shape_of(MODEL), 0.0
    for result in results:
        case = Case(**result["case"])
        setup = Setup(
            case.pairs * PAIR.tokens, case.precision, case.rank, case.checkpointing, case.quantization,
            weights=case.weights,
        )  # fmt: skip
        planned = training_memory(shape, PAIR, setup, result["overhead"]).total
        flops = case.pairs * MICRO_BATCHES * sum(pair_flops(shape, PAIR, setup))
        expected = flops / rate if rate and case.precision == "fp32" else None
        rate = rate or flops / result["seconds"]
        cells = [
            case.name,
            "on" if case.checkpointing else "off",
            f"{setup.max_tokens_per_microbatch:,}",
            f"{result['peak'] / 2**30:.2f}",
            f"{planned / 2**30:.2f} ({planned / result['peak']:.2f})",
            f"{result['seconds']:.1f}",
            f"{expected:.1f} ({expected / result['seconds']:.2f})" if expected else "",
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
    for name, shape in SIZES.items():
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


def fits() -> str:
    """Return a Markdown table of the longest pair of which all stages fit on one GPU, with `sft: null`."""
    params = load_params()
    lora = LoraSettings(rank=16, alpha=32)
    lines = [
        "| model | training | GiB in `train`, 2,048 tokens | " + " | ".join(f"{gb} GB" for gb in CARDS) + " |",
        "| --- | --- |" + " ---: |" * (1 + len(CARDS)),
    ]
    for (name, shape), (method, (engine, training)) in itertools.product(SIZES.items(), METHODS.items()):
        settings = {
            "gradient_checkpointing": True,
            **({} if "optimizer" in training else {"lora": lora}),
            **training,
        }
        changed = dataclasses.replace(
            params,
            sft=None,
            engine=dataclasses.replace(params.engine, precision="bf16", max_tokens_per_microbatch=1024, **engine),
            dpo=dataclasses.replace(params.dpo, **settings),
            evaluate=dataclasses.replace(params.evaluate, max_tokens_per_batch=4096),
        )
        train = stage_memory("train", changed, shape, _pair(2048), Hardware())
        assert train is not None
        cells = [f"{train.total / 2**30:.1f}"]
        for gib in CARDS.values():
            fitting = [n for n in LENGTHS if _largest(changed, shape, _pair(n)) <= gib * 2**30]
            cells.append(f"{max(fitting):,}" if fitting else "no")
        lines.append("| " + " | ".join([name, method, *cells]) + " |")
    return "\n".join(lines)


def _pair(tokens: int) -> Pair:
    return Pair(tokens // 2, tokens // 4)


def _largest(params: Params, shape: Shape, pair: Pair) -> float:
    """Return the peak bytes of the stage that needs most memory."""
    memories = (stage_memory(stage, params, shape, pair, Hardware()) for stage in STAGES)
    return max(memory.total for memory in memories if memory)


if __name__ == "__main__":
    main()
