"""Cache of reference log-probs, with a manifest of everything that they depend on.

A cache is a folder with `logps.parquet` (id, chosen, rejected) and `manifest.json`. It is used only if its
manifest equals the manifest that the reader expects.

Pairs are read, encoded and scored in shards, so memory does not grow with their number. Processes divide the
shards among themselves. Each finished shard is a file with the hash of every row, so that an interrupted run
resumes with any number of processes and never uses a shard of other inputs.
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

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, sha256, write_json
from dpo.engine.logprobs import ENGINE_VERSION, LogProbModel, sequence_logps
from dpo.engine.settings import EngineSettings
from dpo.engine.tokenization import TokenRow, encode_pairs

SHARD_ROWS = 256

JOINED_SHARDS = 256
"""Shards per row group of the finished file: 1.5 MB, which keeps the footer small."""

READ_BYTES = 2**20
"""Bytes of a column per read. Without this limit, a read loads a column of a whole row group."""

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
    model: Path, tokenizer: PreTrainedTokenizerBase, rows: Iterable[TokenRow], engine: EngineSettings
) -> dict[str, object]:
    """Return `policy_key` with the hash of ids, tokens and order of the rows."""
    digest = hashlib.sha256(b"".join(row.digest for row in rows))
    return {**policy_key(model, tokenizer, engine), "rows": digest.hexdigest()}


def compute_reference(
    folder: Path,
    key: dict[str, object],
    pairs: Path,
    model: LogProbModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: EngineSettings,
    progress: Path,
    state: PartialState,
) -> None:
    """Compute the log-probs of canonical pairs in a Parquet file and write the cache `folder` atomically.

    Process r of N computes the shards r, r + N, ... and writes them to the folder `progress`, which all processes
    share. The main process waits for the others and joins all shards. `key` is from `policy_key`.

    Raises:
        InputError: a pair cannot be encoded.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    finished = progress / f"{folder.name}-{name}"
    finished.mkdir(parents=True, exist_ok=True)
    shards = 0
    with pq.ParquetFile(pairs, buffer_size=READ_BYTES, pre_buffer=False) as file:
        for number, batch in enumerate(file.iter_batches(SHARD_ROWS)):
            shards += 1
            if number % state.num_processes == state.process_index:
                rows = encode_pairs(batch.to_pylist(), tokenizer, engine.max_length)
                path, start = finished / f"{number}.parquet", number * SHARD_ROWS
                if path.is_file() and pq.read_table(path)["row"].to_pylist() == [row.digest for row in rows]:
                    continue
                title = f"{folder.name} pairs {start + 1} to {start + len(rows)} of {file.metadata.num_rows}"
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
        logps = sha256(tmp / "logps.parquet")
        write_json(tmp / "manifest.json", {**key, "rows": digest.hexdigest(), "logps": logps})


def load_reference(folder: Path, key: dict[str, object]) -> dict[str, tuple[float, float]]:
    """Return (chosen, rejected) reference log-probs in nats by pair id.

    Raises:
        InputError: the cache is missing, incomplete or altered, or its manifest differs from `key` (`cache_key`).
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        logps = sha256(folder / "logps.parquet")
    except (OSError, ValueError) as error:
        reason = f"{folder}: no complete reference cache ({error}); run the stage `reference_logprobs`"
        raise InputError(reason) from error
    differing = [name for name, value in {**key, "logps": logps}.items() if manifest.get(name) != value]
    if differing:
        raise InputError(
            f"{folder}: stale reference cache, refused: {', '.join(differing)} differ from the inputs that it "
            "was computed with; run the stage `reference_logprobs` again"
        )
    columns = pq.read_table(folder / "logps.parquet").to_pydict()
    return dict(zip(columns["id"], zip(columns["chosen"], columns["rejected"], strict=True), strict=True))
