"""Cache of reference log-probs, with a manifest of everything that they depend on.

A cache is a folder with `logps.arrow` (id, chosen, rejected) and `manifest.json`. It is used only if its manifest
equals the manifest that the reader expects. The file is mapped into memory, so that all processes of a machine
share its pages. `datasets.Dataset.from_file` opens it, too.

Rows are scored in shards, so memory does not grow with their number. Processes divide the shards among
themselves. Each finished shard is a file with the hash of every row, so that an interrupted run resumes with any
number of processes and never uses a shard of other inputs.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo.common.files import atomic_write, sha256
from dpo.common.manifest import check_manifest, write_manifest
from dpo.engine.logprobs import ENGINE_VERSION, LogProbModel, sequence_logps
from dpo.engine.settings import EngineSettings
from dpo.engine.sharding import together
from dpo.engine.token_table import TokenTable
from dpo.engine.tokenization import TokenRow

SHARD_ROWS = 256

JOINED_SHARDS = 256
"""Shards per record batch of the finished file: 65,536 rows."""

LOGPS = Features({"id": Value("string"), "chosen": Value("float64"), "rejected": Value("float64")})
SHARD = LOGPS.arrow_schema.remove_metadata().append(pa.field("row", pa.binary(32)))
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
    with together(model):
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
        with ArrowWriter(features=LOGPS, path=str(tmp / "logps.arrow")) as writer:
            for part in parts:
                digest.update(b"".join(part["row"].to_pylist()))
                writer.write_table(part.select(list(LOGPS)).combine_chunks())
            writer.finalize()
        write_manifest(tmp / "logps.arrow", {**key, "rows": digest.hexdigest()})


@dataclass(frozen=True, eq=False)
class ReferenceLogps(Mapping[str, tuple[float, float]]):
    """(chosen, rejected) reference log-probs in nats by pair id, in rows that are read when they are used.

    Attributes:
        data: the rows of the file.
        hashes: sorted hashes of the ids.
        places: place in `data` of each hash.
    """

    data: Dataset
    hashes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, table: Mapping[str, tuple[float, float]]) -> "ReferenceLogps":
        """Return a mapping as a table in memory, unless it is one of this class already."""
        if isinstance(table, cls):
            return table
        chosen, rejected = zip(*table.values(), strict=True) if table else ((), ())
        columns = dict(zip(LOGPS, ([*table], chosen, rejected), strict=True))
        return cls._of(Dataset(pa.table(columns, LOGPS.arrow_schema)))

    @classmethod
    def _of(cls, data: Dataset) -> "ReferenceLogps":
        chunks = data.data.column("id").chunks
        hashes = np.concatenate([np.empty(0, np.uint64), *(_hashes(chunk.to_pylist()) for chunk in chunks)])
        places = hashes.argsort(kind="stable")
        return cls(data.with_format("arrow"), hashes[places], places)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[str]:
        for chunk in self.data.data.column("id").chunks:
            yield from chunk.to_pylist()

    def __getitem__(self, pair: str) -> tuple[float, float]:
        (found,) = _hashes([pair])
        start, end = (self.hashes.searchsorted(found, side) for side in ("left", "right"))
        for place in self.places[start:end].tolist():
            row: Any = self.data[place]
            name, chosen, rejected = (column[0].as_py() for column in row.columns)
            if name == pair:
                return chosen, rejected
        raise KeyError(pair)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Return the ids that have no log-probs."""
        unknown = ~np.isin(_hashes(ids), self.hashes)
        return [ids[place] for place in np.flatnonzero(unknown).tolist()]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows in their order."""
        digest = hashlib.sha256()
        for name in LOGPS:
            for chunk in self.data.data.column(name).chunks:
                digest.update("".join(f"{each}\0" for each in chunk.to_pylist()).encode())
        return digest.hexdigest()


def _hashes(ids: Sequence[str]) -> np.ndarray:
    return pd.util.hash_array(np.array(ids, dtype=object), categorize=False)


def load_reference(folder: Path, key: dict[str, object]) -> ReferenceLogps:
    """Open a cache, memory-mapped.

    Raises:
        InputError: the cache is missing, incomplete or altered, or its manifest differs from `key` (`cache_key`).
    """
    file = folder / "logps.arrow"
    check_manifest(file, key, "reference cache", "reference_logprobs")
    return ReferenceLogps._of(Dataset.from_file(str(file)))
