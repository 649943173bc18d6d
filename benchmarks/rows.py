"""Measure how the start of a training scales with the data: `python -m benchmarks.rows [--rows N ...]`.

The token tables have random ids, 600 a pair. A process opens them and starts `train_dpo` with a random model of
two layers, until the first micro-batch is packed. Two more processes then map the whole file at once. One thread.
Writes `benchmarks/results/rows.json`, whose sizes are not measured again (delete them to
do so), and a table of `docs/guides/larger-models.md`.
"""

import argparse
import json
import os
import re
import tempfile
import time
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.measure import alone, maxima
from benchmarks.page import put_table
from dpo.common.files import write_json
from dpo.config import load_params
from dpo.engine import token_table
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import SHARD, cache_key, load_reference, policy_key, write_cache
from dpo.engine.settings import EngineSettings
from dpo.engine.token_table import FEATURES, TokenTable, open_table, write_table
from dpo.engine.tokenization import TokenRow
from dpo.training import loop
from dpo.training.train import train_dpo

RESULTS, PAGE = Path("benchmarks/results/rows.json"), Path("docs/guides/larger-models.md")
ENGINE = EngineSettings(max_length=1024, max_tokens_per_microbatch=8192, precision="fp32", compile=False)
PAIRS_PER_STEP, SEED, VOCABULARY, ROWS_AT_ONCE = 64, 17, 512, 10_000
TOKENS = (100, 300)
"""Limits of the tokens of a prompt and of each of two completions, drawn uniformly: 600 a pair in the mean."""
TEXT_BYTES = 800
"""Random bytes of text per pair, written as 1,600 characters that do not compress."""


class Ready(Exception):
    """The first micro-batch is packed."""


def random_table(pairs: list[dict[str, Any]]) -> pa.Table:
    """Return a table of random ids and hashes in place of encoded pairs."""
    draw, count = np.random.default_rng(int(pairs[0]["id"])), len(pairs)

    def lists(count: int) -> pa.ListArray:
        ends = draw.integers(*TOKENS, count, endpoint=True).cumsum()
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, draw.integers(VOCABULARY, size=offsets[-1], dtype=np.int32))

    columns = [
        pa.array([pair["id"] for pair in pairs]),
        pa.array([draw.bytes(32) for _ in pairs]),
        lists(count),
        pa.ListArray.from_arrays(np.arange(0, 2 * count + 1, 2, dtype=np.int32), lists(2 * count)),
        pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), lists(0)),
        pa.nulls(count, pa.bool_()),
    ]
    return pa.table(columns, FEATURES.arrow_schema)


def make_model(folder: Path) -> None:
    """Save a random Llama with two layers and a tokenizer of `VOCABULARY` tokens."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1").save_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_inputs(folder: Path, rows: int) -> None:
    """Write pairs, their token table and a reference cache."""
    model, pairs = folder / "model", folder / "pairs.parquet"
    make_model(model)
    tokenizer = load_tokenizer(model)
    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    with pq.ParquetWriter(pairs, schema) as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, rows))
            writer.write_table(
                pa.table([[*map(str, numbers)], [os.urandom(TEXT_BYTES).hex() for _ in numbers]], schema)
            )
    as_they_are = {"encode_pairs": lambda pairs, *_: pairs, "arrow_table": random_table}
    with patch.multiple(token_table, **as_they_are):
        write_table(folder / "tokens", pairs, tokenizer, ENGINE.max_length)
    table = open_table(folder / "tokens", pairs, tokenizer, ENGINE.max_length)
    columns = table.data.data.table.select(["id", "row"]).combine_chunks()
    logps = np.random.default_rng(SEED).normal(-300, 50, (2, rows))
    shards = pa.table([columns["id"], *map(pa.array, logps), columns["row"].cast(pa.binary(32))], SHARD)
    write_cache(folder / "reference", policy_key(model, tokenizer, ENGINE), [shards])


def rows_of(folder: Path) -> TokenTable:
    """Open the token table."""
    tokenizer = load_tokenizer(folder / "model")
    return open_table(folder / "tokens", folder / "pairs.parquet", tokenizer, ENGINE.max_length)


def memory(file: str, *fields: str) -> list[int]:
    """Return fields of a file under /proc/self in bytes."""
    text = Path("/proc/self", file).read_text()
    return [int(re.findall(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024 for field in fields]


def peaks() -> AbstractContextManager[list[float]]:
    """Yield the highest own (anonymous) and mapped resident bytes inside the block, above those at its start."""
    fields = ("RssAnon", "RssFile")
    before = memory("status", *fields)
    return maxima(lambda: [now - then for now, then in zip(memory("status", *fields), before, strict=True)])


def start_training(folder: Path) -> dict[str, float]:
    """Measure `train` from opening the tables to the first packed micro-batch, without loading the model."""
    torch.set_num_threads(1)
    model, params = load_model(folder / "model"), load_params()
    settings = params.dpo.__class__(epochs=1, pairs_per_step=PAIRS_PER_STEP)
    tokenizer = load_tokenizer(folder / "model")

    def ready(rows: list[TokenRow]) -> None:
        loop_pack(rows)
        raise Ready

    loop_pack, start, cpu = loop.pack, time.perf_counter(), time.process_time()
    with peaks() as found, patch.object(loop, "pack", ready):
        rows = rows_of(folder)
        opened = time.perf_counter() - start
        reference = load_reference(folder / "reference", cache_key(folder / "model", tokenizer, rows, ENGINE))
        try:
            train_dpo(
                model, rows, reference, settings, params.trials()[0],
                max_tokens_per_microbatch=ENGINE.max_tokens_per_microbatch,
            )  # fmt: skip
        except Ready:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory_of = {"own_bytes": found[0], "mapped_bytes": found[1]}
    return {"open_seconds": opened, "seconds": seconds, "cpu_seconds": cpu, **memory_of}


def map_all(folder: Path, together: Any, results: Any) -> None:
    """Read every page of the token table at the same time as another process; put the rises of RSS and PSS."""
    rows = rows_of(folder)
    before = memory("smaps_rollup", "Rss", "Pss")
    together.wait()
    for name in ("prompt", "completions"):
        for chunk in rows.data.data.column(name).chunks:
            values = chunk.values if name == "prompt" else chunk.values.values
            values.to_numpy()[::512].sum()  # one of four bytes in each half page
    together.wait()
    after = memory("smaps_rollup", "Rss", "Pss")
    results.put([now - then for now, then in zip(after, before, strict=True)])
    together.wait()


def share_pages(folder: Path) -> dict[str, int]:
    """Return the mean rises of RSS and PSS of two processes that map the whole table at the same time."""
    context = get_context("spawn")
    together, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=map_all, args=(folder, together, results)) for _ in range(2)]
    for process in processes:
        process.start()
    rises = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    rss, pss = (sum(values) // len(values) for values in zip(*rises, strict=True))
    return {"two_rss_bytes": rss, "two_pss_bytes": pss}


def measure(rows: int) -> dict[str, float]:
    """Measure one size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(write_inputs, folder, rows, OMP_NUM_THREADS="1")
        sizes = {
            "table_bytes": (folder / "tokens/table.arrow").stat().st_size,
            "pairs_bytes": (folder / "pairs.parquet").stat().st_size,
        }
        started = alone(start_training, folder, OMP_NUM_THREADS="1")
        return {"rows": rows, **sizes, **started, **share_pages(folder)}


def table(results: list[dict[str, float]]) -> str:
    """Return results as a Markdown table."""
    lines = [
        "| pairs | table, GB | until the first batch, s | of it CPU, s | own memory, GiB | mapped, GiB "
        "| RSS / PSS of each of two processes, GiB |",
        "| ---: " * 7 + "|",
    ]
    for r in results:
        own, mapped, rss, pss = (r[f"{name}_bytes"] / 2**30 for name in ("own", "mapped", "two_rss", "two_pss"))
        lines.append(
            f"| {r['rows']:,} | {r['table_bytes'] / 1e9:.2f} | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} "
            f"| {own:.2f} | {mapped:.2f} | {rss:.2f} / {pss:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the sizes that have no result yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for rows in parser.parse_args().rows:
        if rows not in [result["rows"] for result in results]:
            results = sorted([*results, measure(rows)], key=lambda result: result["rows"])
            write_json(RESULTS, results)
    put_table(PAGE, "rows", table(results))


if __name__ == "__main__":
    main()
