"""Measure how validation scales with the data: `python -m benchmarks.validate [--rows N ...]`.

Writes JSONL files of about one kilobyte per pair and checks each with `dpo validate FILE`, including the
tokenizer, without and then with benchmark texts in `data/benchmarks/`. Writes `benchmarks/results/validate.json`,
in which sizes that are not measured keep their results, and the table of `docs/guides/data.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import psutil

from benchmarks.page import put_table
from dpo.common.files import write_json
from tasks.common.paths import BASE, BENCHMARKS, TRAIN

RESULTS, PAGE = Path("benchmarks/results/validate.json"), Path("docs/guides/data.md")
SEED = 17
POLL_SECONDS = 0.2
LIMIT_ROWS, LIMIT_GIB = 1_000_000, 4.0
"""A check of this number of pairs must not use more memory."""
EXTRAPOLATED_ROWS = 10_000_000
BENCHMARK_TEXTS, BENCHMARK_SENTENCES = 1000, 3
"""Number of benchmark texts, and sentences of each. No pair contains one of them."""


def write_pairs(path: Path, rows: int, sentences: list[str], *, sound: bool = False) -> None:
    """Write pairs joined from sentences; one in a hundred breaks a rule, unless `sound` is set."""
    draw = np.random.default_rng(SEED)

    def text(count: int) -> str:
        return " ".join(sentences[i] for i in draw.integers(len(sentences), size=count))

    with path.open("wb") as file:
        for number in range(rows):
            pair = {"prompt": f"{number}: {text(1)}", "chosen": text(5), "rejected": text(5)}
            if number % 100 == 0 and not sound:
                pair["chosen"] = " "
            file.write(orjson.dumps(pair) + b"\n")


def write_benchmark(folder: Path, sentences: list[str]) -> None:
    """Write benchmark texts, whose words are in another order than in the pairs."""
    draw = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    with (folder / "texts.jsonl").open("wb") as file:
        for _ in range(BENCHMARK_TEXTS):
            chosen = draw.integers(len(sentences), size=BENCHMARK_SENTENCES)
            words = draw.permutation([word for i in chosen for word in sentences[i].split()])
            file.write(orjson.dumps({"text": " ".join(words)}) + b"\n")


def measure(project: Path, path: Path) -> tuple[float, float]:
    """Return seconds and peak memory (GiB resident, all processes together) of one check in a project folder."""
    command = [sys.executable, "-m", "tasks.commands.cli", "validate", str(path)]
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(
        command, cwd=project, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, sum(map(_resident, [process, *_children(process)])))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - start, peak / 2**30


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    """Measure each size and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validate", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not BASE.is_dir() or not TRAIN.is_file():
        sys.exit(f"{BASE} or {TRAIN} is missing; run `dvc repro validate` first")
    texts = pd.read_parquet(TRAIN)
    sentences = [*texts["chosen"], *texts["rejected"]]
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else []
    for rows in arguments.rows:
        measured = measure_size(rows, sentences)
        others = [result for result in results if result["rows"] != rows]
        results = sorted([*others, measured], key=lambda result: result["rows"])
        print(table([measured]), flush=True)
        write_json(arguments.output, results)
        if arguments.output == RESULTS:
            put_table(PAGE, "validate", table(results))
        if rows >= LIMIT_ROWS and measured["peak_gib"] > LIMIT_GIB:
            sys.exit(f"{rows:,} pairs use {measured['peak_gib']:.2f} GiB, the limit is {LIMIT_GIB:.2f} GiB")


def measure_size(rows: int, sentences: list[str]) -> dict[str, float]:
    """Measure checks of one file without and with benchmark texts, in a project folder of their own."""
    with tempfile.TemporaryDirectory() as name:
        project, path = Path(name), Path(name) / "pairs.jsonl"
        write_pairs(path, rows, sentences)
        (project / "params.yaml").write_bytes(Path("params.yaml").read_bytes())
        (project / BASE).parent.mkdir()
        (project / BASE).symlink_to(BASE.resolve())
        seconds, peak = measure(project, path)
        write_benchmark(project / BENCHMARKS, sentences)
        decontaminated, its_peak = measure(project, path)
        return {
            "rows": rows, "gigabytes": path.stat().st_size / 1e9, "seconds": seconds, "peak_gib": peak,
            "decontaminated_seconds": decontaminated, "decontaminated_peak_gib": its_peak,
        }  # fmt: skip


def table(results: list[dict[str, float]]) -> str:
    """Return results as a Markdown table."""
    lines = [
        "| pairs | JSONL, GB | time, s | throughput, pairs/s | peak memory, GiB | time with decontamination, s |",
        "| ---: " * 6 + "|",
    ]
    for r in results:
        cells = (
            f"{r['gigabytes']:.3f} | {r['seconds']:.1f} | {r['rows'] / r['seconds']:,.0f} | {r['peak_gib']:.2f}"
        )
        with_texts = f"{r['decontaminated_seconds']:.1f}" if "decontaminated_seconds" in r else "**not run**"
        lines.append(f"| {r['rows']:,} | {cells} | {with_texts} |")
    large = [r for r in results if r["rows"] >= LIMIT_ROWS]
    if len(large) > 1:
        fewer, more = large[-2:]
        slope = (more["peak_gib"] - fewer["peak_gib"]) / (more["rows"] - fewer["rows"])
        peak = more["peak_gib"] + slope * (EXTRAPOLATED_ROWS - more["rows"])
        lines += ["", f"A line through the last two sizes gives {peak:.1f} GiB for {EXTRAPOLATED_ROWS:,} pairs."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
