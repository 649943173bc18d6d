"""Measure how the reference pass scales with the data: `python -m benchmarks.reference [--rows N ...]`.

A random model with two layers scores pairs of two sentences, each size in its own process. The model is small so
that reading, encoding, hashing and writing are most of the work. Writes `benchmarks/results/reference.json` and a
table of `docs/guides/larger-models.md`.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.measure import alone, peak, resident
from benchmarks.page import put_table
from dpo.common.files import write_json
from dpo.engine.logprobs import load_model
from dpo.engine.reference_cache import compute_reference, policy_key
from dpo.engine.settings import EngineSettings
from dpo.engine.token_table import open_table, write_table
from tasks.common.paths import BASE, TRAIN

RESULTS, PAGE = Path("benchmarks/results/reference.json"), Path("docs/guides/larger-models.md")
ENGINE = EngineSettings(max_length=512, max_tokens_per_microbatch=8192, precision="fp32", compile=False)
SEED, VOCABULARY, ROWS_AT_ONCE = 17, 512, 10_000


@dataclass(frozen=True)
class Run:
    """One size: seconds, and bytes resident before the pass and at the peak."""

    rows: int
    seconds: float
    before: int
    peak: int


def make_model(folder: Path, sentences: list[str]) -> None:
    """Save a random Llama with two layers and a small tokenizer with the base model's template."""
    tokenizer = AutoTokenizer.from_pretrained(BASE).train_new_from_iterator(sentences, VOCABULARY)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(path: Path, rows: int, sentences: list[str]) -> None:
    """Write pairs of random sentences."""
    draw, writer = np.random.default_rng(SEED), None
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        chosen, rejected = draw.choice(sentences, (2, count))
        table = pa.table(
            {
                "id": [f"pair {number}" for number in range(start, start + count)],
                "prompt": [f"{number}: write one sentence." for number in range(start, start + count)],
                "chosen": chosen.tolist(),
                "rejected": rejected.tolist(),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def measure(folder: Path, rows: int) -> Run:
    """Score one table in this process."""
    model, tokenizer = load_model(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    key, pairs = policy_key(folder / "model", tokenizer, ENGINE), folder / f"{rows}.parquet"
    before, start = resident(), time.perf_counter()
    write_table(folder / "tokens", pairs, tokenizer, ENGINE.max_length)
    table = open_table(folder / "tokens", pairs, tokenizer, ENGINE.max_length)
    compute_reference(folder / "cache", key, table, model, ENGINE, folder / "progress", PartialState(cpu=True))
    return Run(rows, time.perf_counter() - start, before, peak())


def table(results: list[dict[str, Any]]) -> str:
    """Return results as a Markdown table."""
    lines = [
        "| pairs | time, s | throughput, pairs/s | peak memory, GiB | memory of the pass, GiB |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        cells = [
            f"{r['rows']:,}",
            f"{r['seconds']:.0f}",
            f"{r['rows'] / r['seconds']:,.0f}",
            f"{r['peak'] / 2**30:.2f}",
            f"{(r['peak'] - r['before']) / 2**30:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure each size and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    rows = parser.parse_args().rows
    if not BASE.is_dir() or not TRAIN.is_file():
        sys.exit(f"{BASE} or {TRAIN} is missing; run `dvc repro validate` first")
    texts = pd.read_parquet(TRAIN)
    sentences = [*texts["chosen"], *texts["rejected"]]
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", sentences)
        for count in rows:
            write_pairs(folder / f"{count}.parquet", count, sentences)
            results.append(dataclasses.asdict(alone(measure, folder, count)))
    write_json(RESULTS, results)
    put_table(PAGE, "reference", table(results))


if __name__ == "__main__":
    main()
