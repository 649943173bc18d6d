"""Measure how the work grows with the data, the sweep and the evaluation: `python -m benchmarks.curves`.

    python -m benchmarks.curves                             # all curves
    python -m benchmarks.curves --curves tokens responses   # some of them; the others keep their results
    python -m benchmarks.curves --table                     # only write the tables of docs/internals/benchmarks.md

Each point runs in its own process, with one thread. Time is CPU time of the process and its children, so it hardly
depends on what else the machine does. `benchmarks.validate` and `benchmarks.rows` have the curves of validation
and of the start of a training up to a million pairs. Needs a project after `dvc repro`. Results are in
`benchmarks/results/curves.json`.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from benchmarks.measure import alone, peak
from benchmarks.page import put_table
from benchmarks.planner import StepTimes, random_rows
from benchmarks.validate import write_pairs
from dpo.common.files import write_json
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.evaluation.response_metrics import response_metrics, win_slices
from dpo.planner import Pair
from dpo.training.train import train_dpo
from tasks.commands.landed import Checker
from tasks.common import paths
from tasks.common.allocator import TRAINING

RESULTS, PAGE = Path("benchmarks/results/curves.json"), Path("docs/internals/benchmarks.md")
STEPS, TOKEN_LIMIT = 3, 49_000
"""Steps of a training of which the first does not count, and the largest random id."""


@dataclass(frozen=True)
class Point:
    """CPU seconds and peak memory of one size. `details` are further figures of the curve."""

    size: int
    seconds: float
    peak_gib: float
    details: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """What is measured at which sizes."""

    title: str
    column: str
    """Name of the size, for the table."""
    sizes: tuple[int, ...]
    measure: Callable[[int], Point]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measured(size: int, work: Callable[[], Any]) -> Point:
    """Return the time of `work` and the peak memory of this process."""
    start = cpu_seconds()
    work()
    return Point(size, cpu_seconds() - start, peak() / 2**30)


def train_pair(tokens: int) -> Point:
    """Train the base model on pairs of this many tokens, half of them the prompt; seconds per step of one pair."""
    params, rows = load_params(), random_rows(STEPS, Pair(tokens // 2, tokens // 4), TOKEN_LIMIT)
    settings = dataclasses.replace(params.dpo, epochs=1, pairs_per_step=1, early_stop=None)
    reference, clock = {row.id: (-100.0, -100.0) for row in rows}, StepTimes()
    policy = load_model(paths.BASE)
    train_dpo(
        policy, rows, reference, settings, params.trials()[0], max_tokens_per_microbatch=max(1024, tokens),
        callbacks=[clock],
    )  # fmt: skip
    return Point(tokens, statistics.mean(np.diff(clock.ends)), peak() / 2**30)


def sweep(trials: int) -> Point:
    """Bring a sweep up to date whose stages copy a file, and then check that nothing changed."""
    dvc = [sys.executable, "-m", "dvc"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs").write_text("pairs\n")
        matrix = {"trial": list(range(trials))}
        copy = {
            "train": ("pairs", "models/${item.trial}"),
            "evaluate": ("models/${item.trial}", "metrics/${item.trial}"),
        }
        stages: dict[str, Any] = {
            stage: {"matrix": matrix, "cmd": f"cp {source} {target}", "deps": [source], "outs": [target]}
            for stage, (source, target) in copy.items()
        }
        judged = [f"metrics/{trial}" for trial in range(trials)]
        stages["compare"] = {"cmd": "cat metrics/* > report", "deps": judged, "outs": ["report"]}
        YAML().dump({"stages": stages}, folder / "dvc.yaml")
        for made in ("models", "metrics"):
            (folder / made).mkdir()
        for command in (["git", "init", "--quiet"], [*dvc, "init", "--quiet"]):
            subprocess.run(command, cwd=folder, check=True)

        def repro() -> None:
            subprocess.run([*dvc, "repro", "--quiet"], cwd=folder, check=True)

        first, again = measured(trials, repro), measured(trials, repro)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return dataclasses.replace(first, peak_gib=largest / 2**30, details={"seconds_up_to_date": again.seconds})


def judge_responses(count: int) -> Point:
    """Compute the metrics, intervals and slices of this many responses, repeated from the first policy's."""
    params = load_params()
    samples = pd.read_parquet(paths.policy_samples(params.trials()[0]))
    repeated = samples.iloc[np.arange(count) % len(samples)].reset_index(drop=True)
    repeated["prompt"] += [f" {number // len(samples)}" for number in range(count)]

    def compute() -> None:
        response_metrics(repeated, params.seed)
        win_slices(repeated.assign(source="all"), params.seed)

    return measured(count, compute)


def land(rows: int) -> Point:
    """Check a landed file of this many pairs together with the data of the project."""
    texts = pd.read_parquet(paths.TRAIN)
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / "new.jsonl"
        write_pairs(file, rows, [*texts["chosen"], *texts["rejected"]], sound=True)
        return measured(rows, lambda: Checker(load_params(), folder).check({file: file.name}))


CURVES = {
    "tokens": Curve(
        "Training step of one pair", "tokens per pair", (128, 256, 512, 1024, 2048, 4096, 8192), train_pair
    ),
    "trials": Curve("DVC's work for a sweep", "trials", (1, 3, 6, 12, 24), sweep),
    "responses": Curve("Metrics of judged responses", "responses", (96, 384, 1536, 10_000), judge_responses),
    "landed": Curve("Check of landed rows", "rows", (1_000, 10_000, 100_000), land),
}


def main() -> None:
    """Measure the curves and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--curves", nargs="*", choices=CURVES, default=list(CURVES))
    parser.add_argument("--table", action="store_true", help="do not measure; write the page")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [] if options.table else options.curves:
        results[name] = []
        for size in CURVES[name].sizes:
            point = alone(CURVES[name].measure, size, **TRAINING, OMP_NUM_THREADS="1")
            results[name].append(dataclasses.asdict(point))
            write_json(RESULTS, results)
    put_table(PAGE, "curves", tables(results))


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table per curve."""
    blocks = []
    for name, curve in CURVES.items():
        details = [key for point in results.get(name, [])[:1] for key in point["details"]]
        columns = [curve.column, "CPU s", f"CPU ms / {curve.column.split()[0].rstrip('s')}", "peak, GiB"]
        columns += [f"CPU s, {key.removeprefix('seconds_').replace('_', ' ')}" for key in details]
        lines = [f"**{curve.title}**", "", "| " + " | ".join(columns) + " |", "|" + " ---: |" * len(columns)]
        for point in results.get(name, []):
            seconds = point["seconds"]
            cells = [f"{point['size']:,}", f"{seconds:.2f}", f"{1000 * seconds / point['size']:.2f}"]
            cells += [f"{point['peak_gib']:.2f}", *(f"{point['details'][key]:.2f}" for key in details)]
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines if name in results else [f"**{curve.title}**: **not run**"]))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    main()
