"""Cache of reference log-probs, with a manifest of everything that they depend on.

A cache is a folder with `logps.parquet` (id, chosen, rejected) and `manifest.json`. It is used only if its
manifest equals the manifest that the reader expects.

Rows are scored in shards, so memory does not grow with their number. Processes divide the shards among
themselves. Each finished shard is a file with the hash of every row, so that an interrupted run resumes with any
number of processes and never uses a shard of other inputs.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo.common.files import atomic_write, sha256
from dpo.common.manifest import check_manifest, write_manifest
from dpo.engine.logprobs import ENGINE_VERSION, LogProbModel, sequence_logps
from dpo.engine.settings import EngineSettings
from dpo.engine.token_table import TokenTable
from dpo.engine.tokenization import TokenRow

SHARD_ROWS = 256

JOINED_SHARDS = 256
"""Shards per row group of the finished file: 1.5 MB, which keeps the footer small."""

LOGPS = pa.schema({"id": pa.string(), "chosen": pa.float64(), "rejected": pa.float64()})
SHARD = LOGPS.append(pa.field("row", pa.binary(32)))
"""Columns of a shard. `row` is the SHA-256 of the token row."""


def policy_key(model: Path, tokenizer: PreTrainedTokenizerBase, engine: EngineSettings) -> dict[str, object]:
    """Return what reference log-probs depend on, except the rows. Files in the folder `model` are hashed."""
    return {
        "engine": ENGINE_VERSION,
        "precision": engine.precision,
        "compile": engine.compile,
        "quantization": engine.quantization,
        "vocabulary": engine.vocabulary,
        "weights": sha256(*sorted(model.glob("*.safetensors"))),
        "config": sha256(model / "config.json"),
        "tokenizer": sha256(*sorted(model.glob("tokenizer*"))),
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "max_length": engine.max_length,
    }


def cache_key(
    model: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow], engine: EngineSettings
) -> dict[str, object]:
    """Return `policy_key` with the hash of ids, tokens and order of the rows."""
    return {**policy_key(model, tokenizer, engine), "rows": TokenTable.of(rows).digest}


def compute_reference(
    folder: Path,
    key: dict[str, object],
    table: Sequence[TokenRow],
    model: LogProbModel,
    engine: EngineSettings,
    progress: Path,
    state: PartialState,
) -> None:
    """Compute the log-probs of token rows of pairs and write the cache `folder` atomically.

    Process r of N computes the shards r, r + N, ... and writes them to the folder `progress`, which all processes
    share. The main process waits for the others and joins all shards. `key` is from `policy_key`.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    finished = progress / f"{folder.name}-{name}"
    finished.mkdir(parents=True, exist_ok=True)
    shards = -(-len(table) // SHARD_ROWS)
    for number in range(state.process_index, shards, state.num_processes):
        path, start = finished / f"{number}.parquet", number * SHARD_ROWS
        rows = table[start : start + SHARD_ROWS]
        if path.is_file() and pq.read_table(path)["row"].to_pylist() == [row.digest for row in rows]:
            continue
        title = f"{folder.name} pairs {start + 1} to {start + len(rows)} of {len(table)}"
        logps = sequence_logps(model, rows, engine.max_tokens_per_microbatch, title)
        with atomic_write(path) as tmp:
            pq.write_table(shard_table(rows, logps), tmp)
    state.wait_for_everyone()
    if state.is_main_process:
        numbers = (range(shards)[start : start + JOINED_SHARDS] for start in range(0, shards, JOINED_SHARDS))
        parts = ([pq.read_table(finished / f"{number}.parquet") for number in part] for part in numbers)
        write_cache(folder, key, map(pa.concat_tables, parts))
        shutil.rmtree(finished)


def shard_table(rows: Sequence[TokenRow], logps: Tensor) -> pa.Table:
    """Return log-probs [R, 2] (chosen, rejected) of R rows as a shard."""
    chosen, rejected = logps.double().unbind(1)
    columns = [[row.id for row in rows], chosen.tolist(), rejected.tolist(), [row.digest for row in rows]]
    return pa.table(dict(zip(SHARD.names, columns, strict=True)), SHARD)


def write_cache(folder: Path, key: dict[str, object], parts: Iterable[pa.Table]) -> None:
    """Write shards and their manifest as one cache."""
    digest = hashlib.sha256()
    with atomic_write(folder) as tmp:
        tmp.mkdir()
        with pq.ParquetWriter(tmp / "logps.parquet", LOGPS) as writer:
            for part in parts:
                digest.update(b"".join(part["row"].to_pylist()))
                writer.write_table(part.select(LOGPS.names))
        write_manifest(tmp / "logps.parquet", {**key, "rows": digest.hexdigest()})


def load_reference(folder: Path, key: dict[str, object]) -> dict[str, tuple[float, float]]:
    """Return (chosen, rejected) reference log-probs in nats by pair id.

    Raises:
        InputError: the cache is missing, incomplete or altered, or its manifest differs from `key` (`cache_key`).
    """
    check_manifest(folder / "logps.parquet", key, "reference cache", "reference_logprobs")
    columns = pq.read_table(folder / "logps.parquet").to_pydict()
    return dict(zip(columns["id"], zip(columns["chosen"], columns["rejected"], strict=True), strict=True))
