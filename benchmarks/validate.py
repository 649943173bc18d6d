"""Measure how validation scales with the data: `python -m benchmarks.validate [--rows N ...]`.

Writes JSONL files of about one kilobyte per pair and checks each with `dpo validate FILE`, including the
tokenizer. Writes `benchmarks/results/validate.json` and the table of `docs/guides/data.md`.
"""

import argparse
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
from tasks.common.paths import BASE, TRAIN

RESULTS, PAGE = Path("benchmarks/results/validate.json"), Path("docs/guides/data.md")
SEED = 17
POLL_SECONDS = 0.2


def write_pairs(path: Path, rows: int, sentences: list[str]) -> None:
    """Write pairs joined from sentences; one in a hundred breaks a rule."""
    draw = np.random.default_rng(SEED)

    def text(count: int) -> str:
        return " ".join(sentences[i] for i in draw.integers(len(sentences), size=count))

    with path.open("wb") as file:
        for number in range(rows):
            pair = {"prompt": f"{number}: {text(1)}", "chosen": text(5), "rejected": text(5)}
            if number % 100 == 0:
                pair["chosen"] = " "
            file.write(orjson.dumps(pair) + b"\n")


def measure(path: Path, output: Path) -> tuple[float, float]:
    """Return seconds and peak memory (GiB resident, all processes together) of one check."""
    command = [sys.executable, "-m", "tasks.commands.cli", "validate", str(path), "--output", str(output)]
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
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
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            path = Path(folder) / "pairs.jsonl"
            write_pairs(path, rows, sentences)
            size = path.stat().st_size / 1e9
            seconds, peak = measure(path, Path(folder) / "checked")
            results.append({"rows": rows, "gigabytes": size, "seconds": seconds, "peak_gib": peak})
            print(table(results[-1:]), flush=True)
    write_json(arguments.output, results)
    if arguments.output == RESULTS:
        put_table(PAGE, "validate", table(results))


def table(results: list[dict[str, float]]) -> str:
    """Return results as a Markdown table."""
    lines = ["| pairs | JSONL, GB | time, s | throughput, pairs/s | peak memory, GiB |", "| ---: " * 5 + "|"]
    for r in results:
        cells = (
            f"{r['gigabytes']:.3f} | {r['seconds']:.1f} | {r['rows'] / r['seconds']:,.0f} | {r['peak_gib']:.2f}"
        )
        lines.append(f"| {r['rows']:,} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
