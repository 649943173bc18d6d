"""The cases of `benchmarks.gpu`: their shapes, their pairs, and the measurement of both sides.

Models have random weights and pairs are random tokens, because only shapes affect the measurement. Both sides use
bf16, fused AdamW, cached reference log-probs, the same pairs and the same micro-batches. Weights that are not
trained are in bf16 or NF4 on both sides, trained weights in fp32. TRL uses Liger's kernels, pairs sorted by length
and no gradient checkpointing: its fastest settings in this version, which has no padding-free mode. In the case
with checkpointing both sides use it. Our side uses `engine.compile: true`. Each run has its own process, and first
trains on the timed pairs once, so that all kernels are compiled.
"""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.cases import LORA, PAIRS_PER_STEP, SEED, Case, padded_batches, padded_length
from benchmarks.engine import SIDES, load_ours, say, score_ours
from benchmarks.flops import flop_ratio, flops
from benchmarks.measure import Run, alone, close, now, reset_peak, summary
from benchmarks.random_model import OURS, PEER, on_random_weights, random_model, save_shape
from benchmarks.trainers import score_peer, train_ours, train_peer
from dpo.engine.flops import shape_of
from dpo.engine.settings import GPU_HEAD_CHUNK
from dpo.engine.tokenization import TokenRow
from dpo.evaluation.sampling import sample
from dpo.planner import Pair, Setup, reference_memory, training_memory

SPEED, MEMORY, UTILISATION = 2.0, 0.8, 0.5
"""Goals: minimum speed ratio, maximum memory ratio, minimum share of the measured matrix product's speed."""

SHARED: dict[str, Any] = {
    "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_theta": 500_000.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SHAPES = {
    "8b": LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, **SHARED),
    "1b": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True, **SHARED
    ),
}
"""Llama 3 8B and Llama 3.2 1B."""
TINY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip

PROMPT, COMPLETION, TINY_LENGTHS = 1464, 292, (24, 8)
"""Mean tokens of a prompt and of each completion: 2,048 per pair, in the proportions of the CPU's long pairs."""
SAMPLED, SAMPLED_PROMPT, SAMPLED_RESPONSE = 64, 512, 256
"""Responses at once, mean tokens of a prompt, and maximum tokens of a response; 8 responses in the dry run."""
TESTS = Path("tests/unit/engine/test_gpu.py")
VERSIONS = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger-kernel", "triton")


@dataclass(frozen=True)
class GpuCase(Case):
    """One case: training or a reference pass beside TRL, sampling beside transformers, or the tests."""

    shape: str = "8b"
    kind: Literal["pairs", "sampling", "tests"] = "pairs"
    utilisation: float | None = None

    @property
    def config(self) -> LlamaConfig:
        """The model's config; a tiny one for the dry run."""
        config = SHAPES[self.shape].to_dict()
        return LlamaConfig(**config if self.gpu else config | TINY)

    def warm_up(self, rows: Sequence[TokenRow]) -> int:
        """Return half of the pairs: the warm-up has the lengths of the timed steps."""
        return len(rows) // 2

    @property
    def lengths(self) -> tuple[int, int]:
        """Mean tokens of a prompt and of a completion."""
        return (PROMPT, COMPLETION) if self.gpu else TINY_LENGTHS


COMMON: dict[str, Any] = {"gpu": True, "long": True, "by_length": True, "dtype": "bf16"}
ADAPTER: dict[str, Any] = {"lora": True, "vocabulary": "bf16", "micro_batch": 1, "utilisation": UTILISATION}
CASES = [
    GpuCase("lora_8b", SPEED, MEMORY, **ADAPTER, **COMMON),
    GpuCase("nf4_8b", SPEED, MEMORY, quantization="nf4", **ADAPTER, **COMMON),
    GpuCase("full_1b", SPEED, MEMORY, shape="1b", micro_batch=4, utilisation=UTILISATION, **COMMON),
    GpuCase("reference_8b", SPEED, MEMORY, vocabulary="bf16", train=False, **COMMON),
    GpuCase("sampling_8b", None, None, kind="sampling", train=False, **COMMON),
    GpuCase("tests", None, None, kind="tests", **COMMON),
    GpuCase(
        "lora_8b_checkpointing",
        None,
        None,
        checkpointing=True,
        ours_checkpointing=True,
        **ADAPTER | {"utilisation": None},
        **COMMON,
    ),
]


def measure(case: GpuCase, folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Measure one case and return its entry of the results. `folder` is empty.

    Raises:
        RuntimeError: a run failed.
    """
    if case.kind == "tests":
        return run_tests(case)
    save_shape(case.config, folder)
    call = alone if case.gpu else _here
    rows = random_rows(case, steps)
    args: list[Any] = [case, folder, rows]
    ours: Callable[..., Run] = train_ours
    peer: Callable[..., Run] = train_peer
    if case.kind == "sampling":
        ours, peer = sample_ours, sample_peer
    elif not case.train:
        ours, peer = score_ours, score_peer
    else:
        logps = np.reshape(call(on_random_weights, OURS, score_ours, *args).values, (-1, 2)).tolist()
        args.append({row.id: tuple(pair) for row, pair in zip(rows, logps, strict=True)})

    def run(loader: str, side: Callable[..., Run]) -> Run:
        result: Run = call(on_random_weights, loader, side, *args)
        say(f"{case.name}: {side.__name__} {result.pairs_per_second:.2f} per second, {result.peak_gib:.2f} GiB")
        return result

    runs = zip(*([run(OURS, ours), run(PEER, peer)] for _ in range(repeats)), strict=True)
    return record(case, rows, *runs)


def _here(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`. What accelerate and TRL set for the process is undone."""
    with patch.dict(os.environ):
        try:
            return function(*args)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def random_rows(case: GpuCase, steps: int) -> list[TokenRow]:
    """Return random pairs within a quarter of the mean lengths, by length: all of them as warm-up, then again.

    So no kernel is compiled for a new length while time is measured. For sampling, the prompts of the responses.
    """
    draw, vocabulary = np.random.default_rng(SEED), case.config.vocab_size

    def tokens(mean: int) -> tuple[int, ...]:
        length = draw.integers(mean - mean // 4, mean + mean // 4, endpoint=True)
        return tuple(draw.integers(1, vocabulary, length).tolist())

    prompt, completion = case.lengths
    if case.kind == "sampling":
        count, prompt = (SAMPLED, SAMPLED_PROMPT) if case.gpu else (8, prompt)
        return [TokenRow(str(i), tokens(prompt), ()) for i in range(count)]
    rows = [
        TokenRow(str(i), tokens(prompt), (tokens(completion), tokens(completion)))
        for i in range(steps * PAIRS_PER_STEP)
    ]
    rows.sort(key=padded_length, reverse=True)
    return [dataclasses.replace(row, id=f"{row.id} in the warm-up") for row in rows] + rows


def sample_ours(case: GpuCase, model: Path, rows: Sequence[TokenRow]) -> Run:
    """Time our sampling of one response per prompt, in one batch."""
    policy = load_ours(case, model, frozen=True)
    tokenizer, prompts = AutoTokenizer.from_pretrained(model), [" ".join(map(str, row.prompt)) for row in rows]

    def respond(new_tokens: int) -> list[list[int]]:
        budget = sum(len(row.prompt) + new_tokens for row in rows)
        return sample(
            policy, tokenizer, prompts, max_new_tokens=new_tokens, temperature=1.0, seed=SEED,
            max_tokens_per_batch=budget,
        )  # fmt: skip

    return _sampled(case, rows, respond)


def sample_peer(case: GpuCase, model: Path, rows: Sequence[TokenRow]) -> Run:
    """Time `generate` of transformers on the same prompts, in one batch, with weights in bf16."""
    policy = random_model(model, dtype=torch.bfloat16).eval()
    longest = max(len(row.prompt) for row in rows)
    padded = [[0] * (longest - len(row.prompt)) + list(row.prompt) for row in rows]
    ids = torch.tensor(padded, device=policy.device)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def respond(new_tokens: int) -> list[list[int]]:
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        responses = policy.generate(**inputs, **settings, max_new_tokens=new_tokens)[:, longest:].tolist()
        return [row[: row.index(0) + 1] if 0 in row else row for row in responses]

    return _sampled(case, rows, respond)


def _sampled(case: GpuCase, rows: Sequence[TokenRow], respond: Callable[[int], list[list[int]]]) -> Run:
    """Time `respond` after a warm-up; `values` of the run are the tokens of each response."""
    respond(4)
    reset_peak()
    start = now()
    lengths = [float(len(response)) for response in respond(SAMPLED_RESPONSE if case.gpu else 8)]
    end = now()
    run = close(case, rows, [start, end], lengths)
    return dataclasses.replace(run, pairs_per_second=len(rows) / (end - start))


def run_tests(case: GpuCase) -> dict[str, Any]:
    """Run the tests that need a GPU. Without one they are skipped.

    Raises:
        RuntimeError: a test failed.
        subprocess.TimeoutExpired: they take more than 5 minutes.
    """
    command = [sys.executable, "-m", "pytest", str(TESTS), "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return {"case": case.name, "summary": done.stdout.strip().splitlines()[-1]}


def record(case: GpuCase, rows: Sequence[TokenRow], ours: Sequence[Run], peer: Sequence[Run]) -> dict[str, Any]:
    """Return the results of both sides."""
    matmul = max(run.matmul_flops for run in (*ours, *peer))
    entry: dict[str, Any] = {"case": case.name, "matmul_gflops": matmul / 1e9}
    tokens, work = (0.0, 0.0), 0.0
    if case.kind == "pairs":
        timed = rows[case.warm_up(rows) :]
        padded = sum(count * length for count, length in padded_batches(case, timed))
        tokens = (sum(row.tokens for row in timed) / len(timed), padded / len(timed))
        work = flops(case, timed, case.config) / len(timed)
        difference = float(np.abs(np.subtract(ours[0].values, peer[0].values)).max())
        entry |= {"difference": difference, "flop_ratio": flop_ratio(case, timed, case.config)}
        entry["planned_gib"] = planned_bytes(case, timed) / 2**30
    us, them = (
        summary(runs, per_pair, work, matmul) | {"values": runs[0].values}
        for runs, per_pair in zip((ours, peer), tokens, strict=True)
    )
    return entry | {
        "speed_ratio": us["pairs_per_second"] / them["pairs_per_second"],
        "memory_ratio": us["peak_gib"] / them["peak_gib"],
        "ours": us,
        "peer": them,
    }


def planned_bytes(case: GpuCase, rows: Sequence[TokenRow]) -> float:
    """Return the planned peak of our side without process overhead and without `engine.compile`."""
    shape, count = shape_of(case.config), len(rows)
    completion = sum(row.completion_tokens for row in rows) / count / 2
    pair = Pair(round(sum(len(row.prompt) for row in rows) / count), round(completion))
    setup = Setup(
        case.micro_batch * pair.tokens,
        case.dtype,
        lora_rank=LORA["r"] if case.lora else None,
        quantization=case.quantization,
        gradient_checkpointing=case.ours_checkpointing,
        vocabulary=case.vocabulary,
        accumulates=case.micro_batch < PAIRS_PER_STEP,
        head_chunk=GPU_HEAD_CHUNK,
    )
    return (training_memory(shape, pair, setup, 0) if case.train else reference_memory(shape, setup, 0)).total


def environment() -> dict[str, Any]:
    """Return the versions of the packages and the name of the GPU."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": {"gpu": alone(torch.cuda.get_device_name)},
    }


# The report

COLUMNS = (
    "case", "speed ratio (goal)", "FLOP ratio", "memory ratio (goal)", "utilisation, % (goal)",
    "throughput, per second", "peak memory, GiB", "planned, GiB",
)  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return results as Markdown: the machine if there is a result, and one line per case."""
    entries = {entry["case"]: entry for entry in results}
    rows = [
        [case.name, *_cells(case, entries[case.name])]
        if case.name in entries
        else [case.name, "**not run**", *[""] * (len(COLUMNS) - 2)]
        for case in CASES
    ]
    lines = [] if not results else [_machine(results), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _machine(results: Sequence[dict[str, Any]]) -> str:
    machine = results[0].get("machine", {"gpu": "Dry run on a CPU, whose figures mean nothing"})["gpu"]
    packages = "".join(f", {name} {version}" for name, version in results[0].get("versions", {}).items())
    peaks = [entry["matmul_gflops"] for entry in results if "matmul_gflops" in entry]
    peak = f", {max(peaks) / 1e3:.1f} TFLOP/s in a bf16 matrix product" if peaks else ""
    return machine + peak + packages


def _cells(case: GpuCase, entry: dict[str, Any]) -> list[str]:
    if case.kind == "tests":
        return [entry["summary"], *[""] * (len(COLUMNS) - 2)]

    def both(name: str, digits: int, factor: float = 1) -> str:
        return " / ".join(f"{factor * entry[side][name]:.{digits}f}" for side in SIDES)

    is_pairs = case.kind == "pairs"
    return [
        f"{entry['speed_ratio']:.2f}" + (f" (at least {case.speed})" if case.speed else ""),
        f"{entry['flop_ratio']:.2f}" if is_pairs else "",
        f"{entry['memory_ratio']:.2f}" + (f" (at most {case.memory})" if case.memory else ""),
        (both("utilisation", 0, 100) if is_pairs else "")
        + (f" (at least {100 * case.utilisation:.0f})" if case.utilisation else ""),
        both("pairs_per_second", 1),
        both("peak_gib", 1),
        f"{entry['planned_gib']:.1f}" if is_pairs else "",
    ]
