"""Compare speed and memory on one GPU with TRL's `DPOTrainer`: `python -m benchmarks.gpu`.

The model is a Llama with 1.24 billion random weights and pairs are random tokens, because only shapes affect the
measurement. Both sides use bf16 autocast over fp32 weights, fused AdamW, cached reference log-probs, the same
pairs and the same micro-batches. TRL uses Liger's kernels, pairs sorted by length and no gradient checkpointing:
its fastest settings in this version, which has no padding-free mode. Our side uses `engine.precision: bf16` and
`engine.compile: true`. Runs alternate, each in its own process; the first step is a warm-up and is not timed.

It imports only `dpo` and `benchmarks`. Results are written after each case; an interrupted run continues with the
cases that have no result of this GPU and these package versions.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.cases import SEED, Case, padded_batches, padded_length
from benchmarks.engine import comparison_rows, say, sides_of, state_bytes
from benchmarks.flops import flop_ratio, flops
from benchmarks.measure import Run, alone, summary
from benchmarks.page import put_table
from dpo.common.errors import InputError
from dpo.common.files import write_json
from dpo.engine.settings import GPU_HEAD_CHUNK
from dpo.engine.tokenization import TokenRow
from dpo.planner import Pair, Setup, reference_memory, shape_of, training_memory

RESULTS, PAGE = Path("benchmarks/results/gpu.json"), Path("docs/internals/benchmarks.md")
UTILISATION = 0.45
"""Target: minimum share of the measured matrix product's speed."""

LLAMA_1B = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, rope_theta=500_000.0,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
"""The shape of Llama 3.2 1B."""

LONG, EVEN, SHORT = (1464, 292), (1024, 512), (40, 47)
"""Mean tokens of a prompt and of each completion. `LONG` and `EVEN` have 2,048 tokens per pair, in the proportions
of the CPU benchmark's long pairs and half and half; `SHORT` has 134."""

PACKAGES = (
    "accelerate", "datasets", "huggingface_hub", "jinja2", "liger_kernel", "numpy", "pandas", "peft", "psutil",
    "pyarrow", "pydantic", "safetensors", "tokenizers", "torch", "tqdm", "transformers", "triton", "trl",
)  # fmt: skip
"""Packages that both sides import."""
VERSIONS = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "triton")

SHAPES = {"gpu_long": LONG, "gpu_even": EVEN, "gpu_short": SHORT, "gpu_reference": LONG}
COMMON: dict[str, Any] = {"gpu": True, "by_length": True, "dtype": "bf16"}
CASES = [
    Case("gpu_long", 1.5, 0.7, long=True, pairs_per_step=32, micro_batch=4, **COMMON),
    Case("gpu_reference", None, None, long=True, pairs_per_step=32, micro_batch=8, train=False, **COMMON),
    Case("gpu_short", None, None, pairs_per_step=256, micro_batch=64, **COMMON),
    Case("gpu_even", None, None, long=True, pairs_per_step=32, micro_batch=4, **COMMON),
]


def check_machine() -> None:
    """Raise InputError if packages or the GPU are missing, with one line that names all of them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        raise InputError(f"benchmarks.gpu: packages are missing; install them with `pip install {names}`")
    if not torch.cuda.is_available():
        raise InputError("benchmarks.gpu: no CUDA GPU; run it on a machine with one, or use --table")


def random_rows(case: Case, steps: int) -> list[TokenRow]:
    """Return random pairs, within a quarter of the mean lengths: a warm-up step, then the rest by length."""
    draw = np.random.default_rng(SEED)
    prompt, completion = SHAPES[case.name]

    def tokens(mean: int) -> tuple[int, ...]:
        length = draw.integers(mean - mean // 4, mean + mean // 4, endpoint=True)
        return tuple(draw.integers(1, LLAMA_1B.vocab_size, length).tolist())

    rows = [
        TokenRow(str(i), tokens(prompt), (tokens(completion), tokens(completion)))
        for i in range((steps + 1) * case.pairs_per_step)
    ]
    first = case.pairs_per_step
    return rows[:first] + sorted(rows[first:], key=padded_length, reverse=True)


def save_model(folder: Path) -> None:
    """Save a model with random weights and a minimal tokenizer; TRL only reads its end token."""
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LLAMA_1B, dtype=torch.float32)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def planned_bytes(case: Case, rows: Sequence[TokenRow]) -> float:
    """Return the planned peak of this training without process overhead and without `engine.compile`."""
    prompt = sum(len(row.prompt) for row in rows) / len(rows)
    pair = Pair(round(prompt), round(sum(row.completion_tokens for row in rows) / len(rows) / 2))
    tokens = case.micro_batch * pair.tokens
    accumulates = case.micro_batch < case.pairs_per_step
    setup = Setup(tokens, case.dtype, accumulates=accumulates, head_chunk=GPU_HEAD_CHUNK)
    shape = shape_of(LLAMA_1B)
    return (training_memory(shape, pair, setup, 0) if case.train else reference_memory(shape, setup, 0)).total


def compare(case: Case, model: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Measure one case; the two sides alternate."""
    rows = random_rows(case, steps)
    ours, peer, args = sides_of(case, model, rows)

    def measure(side: Callable[..., Run]) -> Run:
        run = alone(side, *args)
        say(f"{case.name}: {side.__name__} {run.pairs_per_second:.2f} pairs/s, {run.peak_gib:.2f} GiB")
        return run

    runs = zip(*([measure(ours), measure(peer)] for _ in range(repeats)), strict=True)
    return record(case, rows, *runs)


def record(case: Case, rows: Sequence[TokenRow], ours: Sequence[Run], peer: Sequence[Run]) -> dict[str, Any]:
    """Return the results entry of one case."""
    timed = rows[case.pairs_per_step :]
    work = flops(case, timed, LLAMA_1B) / len(timed)
    matmul = max(run.matmul_flops for run in (*ours, *peer))

    packed = sum(row.tokens for row in timed)
    padded = sum(count * length for count, length in padded_batches(case, timed))
    us, them = (
        summary(runs, tokens / len(timed), work, matmul) | {"values": runs[0].values}
        for runs, tokens in ((ours, packed), (peer, padded))
    )
    return {
        "case": case.name,
        "dtype": case.dtype,
        "difference": float(np.abs(np.subtract(us["values"], them["values"])).max()),
        "speed_ratio": us["pairs_per_second"] / them["pairs_per_second"],
        "flop_ratio": flop_ratio(case, timed, LLAMA_1B),
        "memory_ratio": us["peak_gib"] / them["peak_gib"],
        "planned_gib": planned_bytes(case, timed) / 2**30,
        "memory_floor": state_bytes(case, LLAMA_1B) / 2**30 / them["peak_gib"],
        "utilisation": us["utilisation"],
        "matmul_gflops": matmul / 1e9,
        "targets": {"speed_ratio": case.speed, "memory_ratio": case.memory, "utilisation": UTILISATION},
        "pairs_per_micro_batch": case.micro_batch,
        "pairs_per_step": case.pairs_per_step,
        "ours": us,
        "peer": them,
        **environment(),
        "setting": dataclasses.asdict(case) | {"steps": len(timed) // case.pairs_per_step, "repeats": len(ours)},
    }


def environment() -> dict[str, Any]:
    """Return the versions of the packages and the name of the GPU."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": {"gpu": alone(torch.cuda.get_device_name)},
    }


def update_flop_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results with FLOP ratios recomputed by `benchmarks.flops`."""
    cases, updated = {case.name: case for case in CASES}, []
    for entry in results:
        case = cases[entry["case"]]
        steps = len(entry["ours"]["values"]) - 1 if case.train else 4
        timed = random_rows(case, steps)[case.pairs_per_step :]
        updated.append(entry | {"flop_ratio": flop_ratio(case, timed, LLAMA_1B)})
    return updated


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return results as Markdown: the machine, the planner's memory, one line per case."""
    packages = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    peak = max(entry["matmul_gflops"] for entry in results) / 1e3
    measured = {entry["case"] for entry in results}
    planned = ", ".join(f"{entry['case']} {entry['planned_gib']:.1f} GiB" for entry in results)
    lines = [
        f"{results[0]['machine']['gpu']}, {peak:.0f} TFLOP/s in a bf16 matrix product; {packages}.",
        f"Planned peak memory of our side: {planned}.",
        "",
        *comparison_rows(results, digits=1),
        *(f"| {case.name} | **not run** |{' |' * 6}" for case in CASES if case.name not in measured),
    ]
    return "\n".join(lines)


def measure_all(cases: Sequence[Case], steps: int, repeats: int, again: bool) -> None:
    """Measure the cases without a result of this environment, all with `again`. Write the results after each."""
    results = {entry["case"]: entry for entry in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    here = environment()

    def is_done(case: Case) -> bool:
        setting = dataclasses.asdict(case) | {"steps": steps, "repeats": repeats}
        return results.get(case.name, {}).items() >= (here | {"setting": setting}).items()

    waiting = [case for case in cases if again or not is_done(case)]
    say(f"{len(cases) - len(waiting)} of {len(cases)} cases have a result")
    with tempfile.TemporaryDirectory() as folder:
        if waiting:
            alone(save_model, Path(folder))
        for case in waiting:
            results[case.name] = compare(case, Path(folder), steps, repeats)
            write_json(RESULTS, [results[case.name] for case in CASES if case.name in results])


def main() -> int:
    """Measure, write results and page, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Compare the engine with TRL on a GPU."
    )
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--again", action="store_true", help="measure also cases that have a result")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--repeats", type=int, default=2, help="runs per side")
    parser.add_argument(
        "--table", action="store_true", help="do not measure; recompute FLOP ratios and write the page"
    )
    options = parser.parse_args()
    if not options.table:
        selected = [case for case in CASES if case.name in (options.cases or [case.name])]
        try:
            check_machine()
        except InputError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        measure_all(selected, options.steps, options.repeats, options.again)
    results = update_flop_ratios(json.loads(RESULTS.read_text()))
    write_json(RESULTS, results)
    put_table(PAGE, "gpu", table(results))
    say(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
