"""Speed and memory of the engine in `dpo`, side by side with TRL's `DPOTrainer`: `python -m benchmarks.engine`.

Both sides get the same model, the same tokens in the same steps, the same reference log-probs, optimizer, dtype
and micro-batch. Runs alternate (ours, peer, ours, peer, ...), each in a process of its own, so that its peak
resident memory is its own. The first step of every run warms up and is not timed.

A `default` case has TRL's default settings, gradient checkpointing among them, and pairs in random order; in a
`checkpointed` case ours has it, too. A `tuned` case has the fastest settings of TRL that were found: pairs grouped
by length, smaller micro-batches, no gradient checkpointing. Ours runs on the same micro-batches each time, so
memory ratios compare like with like.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from benchmarks.cases import CASES, PAIRS_PER_STEP, SEED, Case, case_rows, padded_batches
from benchmarks.flops import flop_ratio, flops
from benchmarks.page import put_table
from dpo.batching import StepSampler, TokenRow
from dpo.config import LoraParams, load_params
from dpo.files import write_json
from dpo.logps import load_model, sequence_logps
from dpo.losses import preference_loss
from dpo.planner import shape_of, trained_parameters
from dpo.trainer import PackedTrainer
from dpo.training import add_lora, cached_reference, dpo_objective

MODEL = Path("models/base")
RESULTS, PAGE = Path("benchmarks/results/engine.json"), Path("docs/benchmarks.md")
BETA = 0.1
LOSS_TOLERANCE, LOGP_TOLERANCE = 1e-3, 1e-5
"""Largest differences in fp32 between the two sides: of a step's loss, and, relative, of a summed log-prob."""
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING = {"optim": "adamw_torch_fused", "learning_rate": 2e-5, "lr_scheduler_type": "constant",
            "weight_decay": 0.0, "max_grad_norm": 1.0, "num_train_epochs": 1, "seed": SEED}  # fmt: skip
QUIET = {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
         "dataloader_pin_memory": False}  # fmt: skip
T = TypeVar("T")
Reference = Mapping[str, tuple[float, float]]
"""(chosen, rejected) reference log-probs by row id."""


@dataclass(frozen=True)
class Run:
    """What one run of one side gave; `values` are losses by step or log-probs by completion, warm-up included.

    `bare_gib` is resident before there is a model; of TRL, which loads it in its constructor, it is not known.
    """

    pairs_per_second: float
    peak_gib: float
    bare_gib: float
    matmul_flops: float
    values: list[float]


# Both sides


def arguments(case: Case) -> dict[str, Any]:
    """Trainer arguments that both sides share."""
    return {
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": PAIRS_PER_STEP // case.micro_batch,
        "bf16": case.dtype == "bf16",
        **TRAINING,
    }


class Clock(TrainerCallback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def train(trainer: Trainer, case: Case, rows: Sequence[TokenRow], bare: float = math.nan) -> Run:
    """Run a trainer of either side."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return close(case, rows, clock.ends, losses, bare)


def close(
    case: Case, rows: Sequence[TokenRow], ends: Sequence[float], values: list[float], bare: float = math.nan
) -> Run:
    """Sum a run up; `ends` are times, the first at the end of the warm-up, the last at the end of the run."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    speed = (len(rows) - PAIRS_PER_STEP) / (ends[-1] - ends[0])
    flops = matmul_flops(torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    return Run(speed, peak / 2**30, bare, flops, values)


def resident() -> float:
    """GiB of this process that are in memory now."""
    return psutil.Process().memory_info().rss / 2**30


def matmul_flops(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    left, right = torch.randn(2, size, size).to(dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


# Ours


class InOrder(StepSampler):
    """The rows in the order given, every step in `PAIRS_PER_STEP / micro_batch` micro-batches."""

    def __init__(self, rows: Sequence[TokenRow], micro_batch: int) -> None:
        lengths = [row.tokens for row in rows]
        super().__init__(lengths, rows_per_step=PAIRS_PER_STEP, tokens_per_batch=sum(lengths), epochs=1, seed=SEED)
        self.accumulation = PAIRS_PER_STEP // micro_batch

    def _steps(self, epoch: int) -> list[list[int]]:
        return np.arange(len(self.lengths)).reshape(-1, PAIRS_PER_STEP).tolist()


def train_ours(case: Case, model: Path, rows: Sequence[TokenRow], reference: Reference) -> Run:
    """DPO with `dpo.training`'s trainer; bf16 is the engine's own, not the trainer's."""
    if case.lora:
        import peft  # noqa: F401
    bare = resident()
    policy = load_model(model, case.dtype)
    set_seed(SEED)
    if case.ours_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if case.lora:
        add_lora(policy, LoraParams(rank=LORA["r"], alpha=LORA["lora_alpha"]))
    loss = functools.partial(preference_loss, beta=BETA, loss="sigmoid", settings=load_params().losses)
    objective = functools.partial(dpo_objective, loss=loss, reference=cached_reference(reference, rows))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, **arguments(case) | {"bf16": False}, **QUIET, remove_unused_columns=False)
        sampler = InOrder(rows, case.micro_batch)
        return train(PackedTrainer(policy, args, rows, sampler, objective, "ids", [], False, []), case, rows, bare)


def score_ours(case: Case, model: Path, rows: Sequence[TokenRow]) -> Run:
    """The reference pass, in batches of at least as many pairs as the peer's."""
    bare = resident()
    policy = load_model(model, case.dtype)
    budget = case.micro_batch * max(row.tokens for row in rows)
    warm_up = sequence_logps(policy, rows[:PAIRS_PER_STEP], budget)
    start = time.perf_counter()
    timed = sequence_logps(policy, rows[PAIRS_PER_STEP:], budget)
    logps = torch.cat([warm_up, timed]).flatten().tolist()
    return close(case, rows, [start, time.perf_counter()], logps, bare)


# The peer, imported only where it runs: our side must not carry its memory


def peer_trainer(
    case: Case, model: Path, rows: Sequence[TokenRow], folder: str, reference: Reference | None = None
) -> Any:
    """TRL's DPOTrainer on our tokens; batches, forward pass, loss and loop are its own.

    It takes `reference` for its precomputed log-probs; without, it computes them itself, timed in `ends`.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class Peer(DPOTrainer):
        ends: list[float]

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
            self.ends = []
            return dataset if reference else super()._precompute_ref_logps(dataset, *args)

        def compute_ref_log_probs(self, *args: Any) -> Any:
            logps = super().compute_ref_log_probs(*args)
            self.ends.append(time.perf_counter())
            return logps

    columns: dict[str, list[Any]] = {
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.completions[0] for row in rows],
        "rejected_ids": [row.completions[1] for row in rows],
    }
    if reference:
        columns["ref_chosen_logps"] = [reference[row.id][0] for row in rows]
        columns["ref_rejected_logps"] = [reference[row.id][1] for row in rows]
    args = DPOConfig(
        folder,
        **arguments(case),
        **QUIET,
        activation_checkpointing=case.checkpointing,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = Dataset.from_dict(columns)
    lora = LoraConfig(**LORA) if case.lora else None
    return Peer(str(model), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def train_peer(case: Case, model: Path, rows: Sequence[TokenRow], reference: Reference) -> Run:
    """DPO with TRL's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        return train(peer_trainer(case, model, rows, folder, reference), case, rows)


def score_peer(case: Case, model: Path, rows: Sequence[TokenRow]) -> Run:
    """TRL's own reference pass, which its constructor runs."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = peer_trainer(case, model, rows, folder)
        logps = [trainer.train_dataset[column] for column in ("ref_chosen_logps", "ref_rejected_logps")]
        return close(case, rows, trainer.ends, np.stack(logps, axis=1).flatten().tolist())


# One comparison


def alone(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def compare(case: Case, model: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Measure one case: alternating repeats of both sides."""
    rows = case_rows(case, AutoTokenizer.from_pretrained(model), steps)
    args: list[Any] = [case, model, rows]
    sides: tuple[Callable[..., Run], ...] = (score_ours, score_peer)
    if case.train:
        logps = np.reshape(alone(score_ours, *args).values, (-1, 2)).tolist()
        args.append({row.id: tuple(pair) for row, pair in zip(rows, logps, strict=True)})
        sides = (train_ours, train_peer)
    runs: dict[str, list[Run]] = {side.__name__: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            run = alone(side, *args)
            runs[side.__name__].append(run)
            say(f"{case.name}: {side.__name__} {run.pairs_per_second:.3f} pairs/s, {run.peak_gib:.2f} GiB")
    entry = record(case, rows, AutoConfig.from_pretrained(model), *runs.values())
    if case.train:
        for step, losses in enumerate(zip(entry["ours"]["losses"], entry["peer"]["losses"], strict=True)):
            say(f"{case.name}: step {step}, losses {losses[0]:.6f} and {losses[1]:.6f}")
    say(f"{case.name}: largest difference {entry['difference']:.1e}, {entry['status']}")
    return entry


def record(
    case: Case, rows: Sequence[TokenRow], config: Any, ours: Sequence[Run], peer: Sequence[Run]
) -> dict[str, Any]:
    """The entry of one case in the results."""
    timed = rows[PAIRS_PER_STEP:]
    padded = sum(count * length for count, length in padded_batches(case, timed))
    work = flops(case, timed, config) / len(timed)
    matmul = max(run.matmul_flops for run in (*ours, *peer))
    settings = arguments(case) | {"beta": BETA, "lora": LORA if case.lora else None}
    settings |= {"timed_steps": len(timed) // PAIRS_PER_STEP, "order": "by length" if case.by_length else "random"}

    def side(runs: Sequence[Run], tokens: int, checkpointing: bool) -> dict[str, Any]:
        speed = statistics.median(run.pairs_per_second for run in runs)
        return {
            "pairs_per_second": speed,
            "pairs_per_second_repeats": [run.pairs_per_second for run in runs],
            "peak_gib": statistics.median(run.peak_gib for run in runs),
            "utilisation": work * speed / matmul,
            "tokens_per_pair": tokens / len(timed),
            "settings": settings | {"gradient_checkpointing": checkpointing},
            "losses" if case.train else "logps": runs[0].values,
        }

    us = side(ours, sum(row.tokens for row in timed), case.ours_checkpointing)
    them = side(peer, padded, case.checkpointing)
    a, b = np.array(ours[0].values), np.array(peer[0].values)
    agree = np.allclose(a, b, **({"rtol": 0, "atol": LOSS_TOLERANCE} if case.train else {"rtol": LOGP_TOLERANCE}))
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "accelerate", "trl")}
    cpu = [line.split(": ")[1] for line in _cpuinfo() if line.startswith("model name")]
    return {
        "case": case.name,
        "dtype": case.dtype,
        "status": "not compared" if case.dtype != "fp32" else "same" if agree else "failed",
        "difference": float(np.abs(a - b).max()),
        "speed_ratio": us["pairs_per_second"] / them["pairs_per_second"],
        "flop_ratio": flop_ratio(case, timed, config),
        "memory_ratio": us["peak_gib"] / them["peak_gib"],
        "memory_floor": (ours[0].bare_gib + state_bytes(case, config) / 2**30) / them["peak_gib"],
        "utilisation": us["utilisation"],
        "matmul_gflops": matmul / 1e9,
        "targets": {"speed_ratio": case.speed, "memory_ratio": case.memory},
        "ours": us,
        "peer": them,
        "versions": versions | {"python": platform.python_version()},
        "machine": {
            "cpu": (cpu or [platform.machine()])[0],
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def state_bytes(case: Case, config: Any) -> int:
    """Bytes that nobody does without: the weights, and of trained ones gradients and AdamW's two states."""
    shape, rank = shape_of(config), LORA["r"] if case.lora else None
    trained = trained_parameters(shape, rank)
    return 4 * (shape.parameters + case.lora * trained) + 12 * case.train * trained


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# The report


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as Markdown: where they were measured, then one line a case."""
    machine, versions = results[0]["machine"], results[0]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB; {packages}.",
        "Of two figures in a cell, the first is ours, the second TRL's.",
        "",
    ]
    for entry in results:
        us, them, goal = entry["ours"], entry["peer"], entry["targets"]
        settings = them["settings"]
        cells = {
            "case": entry["case"],
            "dtype": entry["dtype"],
            "speed ratio": f"{entry['speed_ratio']:.2f}",
            "speed target": f"at least {goal['speed_ratio']}" if goal["speed_ratio"] else "none",
            "FLOP ratio": f"{entry['flop_ratio']:.2f}",
            "memory ratio": f"{entry['memory_ratio']:.2f}",
            "memory floor": f"{entry['memory_floor']:.2f}",
            "memory target": f"at most {goal['memory_ratio']}" if goal["memory_ratio"] else "none",
            "utilisation": f"{us['utilisation']:.0%}, {them['utilisation']:.0%}",
            "pairs/s": f"{us['pairs_per_second']:.2f}, {them['pairs_per_second']:.2f}",
            "peak GiB": f"{us['peak_gib']:.2f}, {them['peak_gib']:.2f}",
            "tokens a pair": f"{us['tokens_per_pair']:.0f}, {them['tokens_per_pair']:.0f}",
            "pairs a micro-batch": settings["per_device_train_batch_size"],
            "order": settings["order"],
            "checkpointing": ", ".join(
                "on" if side["settings"]["gradient_checkpointing"] else "off" for side in (us, them)
            ),
            "numbers": f"{entry['status']}, {entry['difference']:.0e}",
        }
        if entry is results[0]:
            lines += ["| " + " | ".join(cells) + " |", "|" + " --- |" * len(cells)]
        lines.append("| " + " | ".join(map(str, cells.values())) + " |")
    return "\n".join(lines)


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Measure, write results and page, print the table; 1 if the two sides' numbers differ in a case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description="Measure ours against TRL.")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--steps", type=int, default=4, help="timed steps; cases of long pairs take a quarter")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=RESULTS, help="results; the page shows the default file")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the page")
    options = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(options.output.read_text()) if options.table else []
    failures: list[str] = []
    for case in [] if options.table else CASES:
        if case.name not in (options.cases or [case.name]):
            continue
        steps = max(1, options.steps // 4) if case.long else options.steps
        try:
            results.append(compare(case, options.model, steps, options.repeats))
        except RuntimeError as error:
            say(f"{case.name}: failed, {error}")
            failures.append(case.name)
            continue
        write_json(options.output, results)
    if not results:
        return 1
    if options.output == RESULTS:
        put_table(PAGE, "engine", table(results))
    say(table(results))
    failures += [entry["case"] for entry in results if entry["status"] == "failed"]
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
