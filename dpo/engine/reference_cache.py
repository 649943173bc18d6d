"""Reference log-probs, computed once and kept with a manifest of everything that they depend on.

A cache is a folder with `logps.parquet` (id, chosen, rejected) and `manifest.json`. It is used only if every
entry of its manifest equals what the reader expects; otherwise it is refused with the entry named.

Pairs are read, encoded and scored a shard at a time, so memory does not grow with their number. Several processes
share the shards out among themselves. A finished shard waits in a file that also holds the hash of each of its
rows, so a run that was cut off goes on where it stopped, with any number of processes, and takes no shard but its
own.
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
from dpo.engine.packing import TokenRow
from dpo.engine.settings import EngineSettings
from dpo.engine.tokenization import encode_pairs

SHARD_ROWS = 256
"""Rows that are read, computed and kept at a time."""

JOINED_SHARDS = 256
"""Shards in one row group of the finished file: 1.5 MB, and a footer that stays small."""

READ_BYTES = 2**20
"""Bytes of a column that are read at a time; without this limit all of the column's row group would be."""

LOGPS = pa.schema({"id": pa.string(), "chosen": pa.float64(), "rejected": pa.float64()})
SHARD = LOGPS.append(pa.field("row", pa.binary(32)))
"""A shard also has the SHA-256 of every row."""


def policy_key(model: Path, tokenizer: PreTrainedTokenizerBase, engine: EngineSettings) -> dict[str, object]:
    """What reference log-probs depend on besides the rows, by content.

    Args:
        model: the reference policy's folder; weights, config and tokenizer files are hashed.
        tokenizer: its chat template is hashed too.
        engine: how text becomes log-probs.
    """
    return {
        "engine": ENGINE_VERSION,
        "precision": engine.precision,
        "compile": engine.compile,
        "weights": sha256(*sorted(model.glob("*.safetensors"))),
        "config": sha256(model / "config.json"),
        "tokenizer": sha256(*sorted(model.glob("tokenizer*"))),
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "max_length": engine.max_length,
    }


def cache_key(
    model: Path, tokenizer: PreTrainedTokenizerBase, rows: Iterable[TokenRow], engine: EngineSettings
) -> dict[str, object]:
    """What reference log-probs depend on: `policy_key` and the ids, the tokens and the order of the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.digest)
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
    """Compute the log-probs of a table of pairs shard by shard and write them with their manifest.

    Process r of N computes the shards r, r + N, ...; the main process waits for all of them and joins them.

    Args:
        folder: the cache, all or nothing.
        key: from `policy_key`, of this model, tokenizer and engine.
        pairs: Parquet with canonical pairs.
        model: the reference policy, from `dpo.engine.logprobs.load_model`.
        tokenizer: of the model.
        engine: how pairs become log-probs.
        progress: where shards wait until all are done, the same for all processes; survives an interruption.
        state: which process of how many this is.

    Raises:
        InputError: from `dpo.engine.tokenization.encode_pairs`.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    waiting = progress / f"{folder.name}-{name}"
    waiting.mkdir(parents=True, exist_ok=True)
    shards = 0
    with pq.ParquetFile(pairs, buffer_size=READ_BYTES, pre_buffer=False) as file:
        for number, batch in enumerate(file.iter_batches(SHARD_ROWS)):
            shards += 1
            if number % state.num_processes == state.process_index:
                rows = encode_pairs(batch.to_pylist(), tokenizer, engine.max_length)
                start = number * SHARD_ROWS
                title = f"{folder.name} pairs {start + 1} to {start + len(rows)} of {file.metadata.num_rows}"
                _compute_shard(waiting / f"{number}.parquet", model, rows, engine.max_tokens_per_microbatch, title)
    state.wait_for_everyone()
    if state.is_main_process:
        numbers = (range(shards)[start : start + JOINED_SHARDS] for start in range(0, shards, JOINED_SHARDS))
        parts = ([pq.read_table(waiting / f"{number}.parquet") for number in part] for part in numbers)
        _write(folder, key, map(pa.concat_tables, parts))
        shutil.rmtree(waiting)


def _compute_shard(
    path: Path, model: LogProbModel, rows: Sequence[TokenRow], max_tokens_per_microbatch: int, title: str
) -> None:
    """Unless the file holds these very rows already."""
    if path.is_file() and pq.read_table(path)["row"].to_pylist() == [row.digest for row in rows]:
        return
    logps = sequence_logps(model, rows, max_tokens_per_microbatch, title)
    with atomic_write(path) as tmp:
        pq.write_table(_shard(rows, logps), tmp)


def _shard(rows: Sequence[TokenRow], logps: Tensor) -> pa.Table:
    chosen, rejected = logps.double().unbind(1)
    columns = [[row.id for row in rows], chosen.tolist(), rejected.tolist(), [row.digest for row in rows]]
    return pa.table(dict(zip(SHARD.names, columns, strict=True)), SHARD)


def save_reference(folder: Path, key: dict[str, object], rows: Sequence[TokenRow], logps: Tensor) -> None:
    """Write log-probs [R, 2] (chosen, rejected) of R rows and their manifest, all or nothing."""
    _write(folder, key, [_shard(rows, logps)])


def _write(folder: Path, key: dict[str, object], parts: Iterable[pa.Table]) -> None:
    """Tables of the schema `SHARD`, one after the other."""
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
    """(chosen, rejected) reference log-probs in nats by pair id.

    Args:
        folder: the cache.
        key: from `cache_key`, of what the log-probs are wanted for.

    Raises:
        InputError: the cache is absent, incomplete, altered, or was computed from other inputs than `key`
            tells; the message names each input that differs.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        logps = sha256(folder / "logps.parquet")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no whole reference cache here ({error}); run the stage `reference_logprobs`"
        ) from error
    differing = [name for name, value in {**key, "logps": logps}.items() if manifest.get(name) != value]
    if differing:
        raise InputError(
            f"{folder}: stale reference cache, refused: {', '.join(differing)} differ from those it was computed "
            "with; run the stage `reference_logprobs` again"
        )
    columns = pq.read_table(folder / "logps.parquet").to_pydict()
    return dict(zip(columns["id"], zip(columns["chosen"], columns["rejected"], strict=True), strict=True))
