"""Compare speed and memory of the engine with TRL's `DPOTrainer`: `python -m benchmarks.engine`.

Both sides use the same model, tokens, steps, reference log-probs, optimizer, dtype and micro-batches. Runs of the
two sides alternate, each in its own process, so that peak resident memory is that of one run. The first step of
each run is a warm-up and is not timed.

`default` cases use TRL's defaults, which include gradient checkpointing, and pairs in random order. With long
pairs our side uses gradient checkpointing too, because activations are most of the memory. `tuned` cases use the
fastest settings of TRL that we found: pairs sorted by length, smaller micro-batches, no gradient checkpointing.

Our side runs with the allocator settings of the stages. TRL runs without them, and a second time with them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.cases import BETA, CASES, LORA, PAIRS_PER_STEP, TRAIN, Case, arguments, case_rows, padded_batches
from benchmarks.flops import flop_ratio, flops
from benchmarks.measure import Run, alone, close, now, reset_peak, resident, summary
from benchmarks.page import put_table
from dpo.common.files import write_json
from dpo.engine.flops import shape_of
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.tokenization import TokenRow
from dpo.planner import trained_parameters

MODEL = Path("models/base")
RESULTS, PAGE = Path("benchmarks/results/engine.json"), Path("docs/internals/benchmarks.md")
SIDES = ("ours", "peer")
LOSS_TOLERANCE, LOGP_TOLERANCE = 1e-3, 1e-5
"""Maximum differences of the two sides in fp32: absolute for a step's loss, relative for a summed log-prob."""


def load_ours(case: Case, model: Path, frozen: bool) -> LogProbModel:
    """Load the model of our side onto its device.

    Raises:
        RuntimeError: the packed stream is not exact for it, so that a comparison would mean nothing.
    """
    policy = load_model(model, **case.loading, frozen=frozen)
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "bf16"  # as `load_model` sets it, see `random_model`
    if not policy.in_stream:
        raise RuntimeError(f"{model}: log-probs are computed row by row")
    return policy.to("cuda" if case.gpu else "cpu")


def score_ours(case: Case, model: Path, rows: Sequence[TokenRow]) -> Run:
    """Time our reference pass, in batches of at least as many pairs as the peer's."""
    bare = resident()
    policy = load_ours(case, model, frozen=True)
    reset_peak()
    budget = case.micro_batch * max(row.tokens for row in rows)
    warm_up = sequence_logps(policy, rows[: case.warm_up(rows)], budget)
    start = now()
    timed = sequence_logps(policy, rows[case.warm_up(rows) :], budget)
    logps = torch.cat([warm_up, timed]).flatten().tolist()
    return close(case, rows, [start, now()], logps, bare)


def sides_of(
    case: Case, model: Path, rows: Sequence[TokenRow]
) -> tuple[Callable[..., Run], Callable[..., Run], list[Any]]:
    """Return the functions of both sides and their arguments; training also gets our reference log-probs."""
    from benchmarks.trainers import score_peer, train_ours, train_peer

    args: list[Any] = [case, model, rows]
    if not case.train:
        return score_ours, score_peer, args
    logps = np.reshape(alone(score_ours, *args).values, (-1, 2)).tolist()
    args.append({row.id: tuple(pair) for row, pair in zip(rows, logps, strict=True)})
    return train_ours, train_peer, args


def compare(case: Case, model: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Measure one case: our side, the peer, and the peer with the stages' allocator settings, repeatedly."""
    from tasks.common.allocator import SCORING, TRAINING  # benchmarks.gpu runs where only `dpo` is

    rows = case_rows(case, AutoTokenizer.from_pretrained(model), steps)
    stage = TRAINING if case.train else SCORING
    ours, peer, args = sides_of(case, model, rows)

    def measure(side: Callable[..., Run], environment: Mapping[str, str]) -> Run:
        run = alone(side, *args, **environment)
        line = f"{case.name}: {side.__name__} {run.pairs_per_second:.3f} pairs/s, {run.peak_gib:.2f} GiB"
        say(line + (" with the stages' allocator settings" if environment else ""))
        return run

    sides = ((ours, stage), (peer, {}), (peer, stage))
    runs = zip(*([measure(*side) for side in sides] for _ in range(repeats)), strict=True)
    entry = record(case, rows, AutoConfig.from_pretrained(model), *runs)
    if case.train:
        for step, losses in enumerate(zip(entry["ours"]["losses"], entry["peer"]["losses"], strict=True)):
            say(f"{case.name}: step {step}, losses {losses[0]:.6f} and {losses[1]:.6f}")
    say(f"{case.name}: largest difference {entry['difference']:.1e}, {entry['status']}")
    return entry


def record(
    case: Case,
    rows: Sequence[TokenRow],
    config: Any,
    ours: Sequence[Run],
    peer: Sequence[Run],
    tuned_peer: Sequence[Run],
) -> dict[str, Any]:
    """Return the results entry of one case; `tuned_peer` ran with the stages' allocator settings."""
    timed = rows[PAIRS_PER_STEP:]
    padded = sum(count * length for count, length in padded_batches(case, timed))
    work = flops(case, timed, config) / len(timed)
    matmul = max(run.matmul_flops for run in (*ours, *peer))
    settings = arguments(case) | {"beta": BETA, "lora": LORA if case.lora else None}
    settings |= {"timed_steps": len(timed) // PAIRS_PER_STEP, "order": "by length" if case.by_length else "random"}

    def side(runs: Sequence[Run], tokens: int, checkpointing: bool) -> dict[str, Any]:
        return summary(runs, tokens / len(timed), work, matmul) | {
            "settings": settings | {"gradient_checkpointing": checkpointing},
            "losses" if case.train else "logps": runs[0].values,
        }

    us = side(ours, sum(row.tokens for row in timed), case.ours_checkpointing)
    them, tuned = (side(runs, padded, case.checkpointing) for runs in (peer, tuned_peer))
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
        "same_allocator": {
            "speed_ratio": us["pairs_per_second"] / tuned["pairs_per_second"],
            "memory_ratio": us["peak_gib"] / tuned["peak_gib"],
            "peer": {name: tuned[name] for name in ("pairs_per_second", "pairs_per_second_repeats", "peak_gib")},
        },
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


def update_flop_ratios(results: list[dict[str, Any]], model: Path) -> list[dict[str, Any]]:
    """Return the results with FLOP ratios recomputed by `benchmarks.flops`."""
    cases, config = {case.name: case for case in CASES}, AutoConfig.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    updated = []
    for entry in results:
        case, steps = cases[entry["case"]], entry["ours"]["settings"]["timed_steps"]
        rows = case_rows(case, tokenizer, steps)[PAIRS_PER_STEP:]
        updated.append(entry | {"flop_ratio": flop_ratio(case, rows, config)})
    return updated


def state_bytes(case: Case, config: Any) -> int:
    """Return the bytes every implementation needs: weights, and gradients and AdamW states of trained ones."""
    shape, rank = shape_of(config), LORA["r"] if case.lora else None
    trained = trained_parameters(shape, rank)
    return 4 * (shape.parameters + case.lora * trained) + 12 * case.train * trained


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# The report


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return results as Markdown: the machine, the agreement of both sides, one line per case."""
    machine, versions = results[0]["machine"], results[0]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    status = [entry["status"] for entry in results if entry["dtype"] == "fp32"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB; {packages}.",
        f"The numbers of both sides agree in {status.count('same')} of {len(status)} fp32 cases.",
        "",
        *comparison_rows(results, digits=2),
    ]
    return "\n".join(lines)


def comparison_rows(results: Sequence[Mapping[str, Any]], digits: int) -> list[str]:
    """Return the lines of a Markdown table; throughput and memory have this many decimals."""
    rows = [
        {
            "case": entry["case"],
            "speed ratio (target)": f"{entry['speed_ratio']:.2f}{_target('at least', entry, 'speed_ratio')}",
            "FLOP ratio": f"{entry['flop_ratio']:.2f}",
            "memory ratio (target)": f"{entry['memory_ratio']:.2f}{_target('at most', entry, 'memory_ratio')}",
            "memory floor": f"{entry['memory_floor']:.2f}",
            "utilisation, %": " / ".join(f"{100 * entry[s]['utilisation']:.0f}" for s in SIDES),
            "throughput, pairs/s": " / ".join(f"{entry[s]['pairs_per_second']:.{digits}f}" for s in SIDES),
            "peak memory, GiB": " / ".join(f"{entry[s]['peak_gib']:.{digits}f}" for s in SIDES),
        }
        for entry in results
    ]
    head = ["| " + " | ".join(rows[0]) + " |", "| --- |" + " ---: |" * (len(rows[0]) - 1)]
    return head + ["| " + " | ".join(row.values()) + " |" for row in rows]


def _target(word: str, entry: Mapping[str, Any], name: str) -> str:
    goal = entry["targets"][name]
    return f" ({word} {goal})" if goal else ""


def say(text: str) -> None:
    """Print a line and flush."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Measure, write results and page, print the table; return 1 if the two sides differ in a case."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description="Compare the engine with TRL."
    )
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--steps", type=int, default=4, help="timed steps; cases with long pairs run a quarter")
    parser.add_argument("--repeats", type=int, default=2, help="runs per side")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="results file; only the default file updates the page"
    )
    parser.add_argument(
        "--table", action="store_true", help="do not measure; recompute FLOP ratios and write the page"
    )
    options = parser.parse_args()
    for path in (options.model / "config.json", TRAIN):
        if not path.is_file():
            sys.exit(f"{path} is missing; run `dvc repro fetch_model validate` first")
    results: list[dict[str, Any]] = []
    if options.table:
        results = update_flop_ratios(json.loads(options.output.read_text()), options.model)
        write_json(options.output, results)
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
