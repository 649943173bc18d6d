"""Token rows in Arrow files that all stages and processes map into memory.

A table is a folder with `table.arrow` and `manifest.json`. The file has one row per pair, in the order of the
Parquet file that it was made from. It is opened without reading the token ids. The pages that are used are shared
by all processes of a machine, and the system drops them if it needs memory. `datasets.Dataset.from_file` opens the
file, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from dpo.common.files import atomic_write, sha256
from dpo.common.manifest import check_manifest, write_manifest
from dpo.common.progress import progress
from dpo.engine.chat import completion_fields
from dpo.engine.logprobs import ENGINE_VERSION
from dpo.engine.tokenization import TokenRow, encode_pairs, labelled_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS_AT_ONCE = 1000
"""Pairs that are encoded together, and rows of a record batch."""

READ_BYTES = 2**20
"""Bytes of a column per read. Without this limit, a read loads a column of a whole row group."""

IDS = List(Value("int32"))
FEATURES = Features(
    {"id": Value("string"), "row": Value("binary"), "prompt": IDS, "completions": List(IDS), "context": List(IDS)}
    | {"desirable": Value("bool")}
)
"""Columns of a table: the fields of `TokenRow`, and in `row` its SHA-256."""


@dataclass(frozen=True, eq=False)
class TokenTable(Sequence[TokenRow]):
    """A sequence of token rows. Each row is made when it is used; its token ids are views of the file.

    Attributes:
        data: the rows of the file.
        order: places in `data` of the rows of this table.
        kept: number of completions that a row has at most, or None for all.
    """

    data: Dataset
    order: np.ndarray
    kept: int | None = None

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> TokenTable:
        """Return rows as a table in memory, unless they are a table already."""
        return rows if isinstance(rows, cls) else cls._of(Dataset(arrow_table(rows)))

    @classmethod
    def _of(cls, data: Dataset) -> TokenTable:
        return cls(data.with_format("arrow"), np.arange(len(data)))

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> TokenRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenRow]: ...
    def __getitem__(self, place: int | slice) -> TokenRow | list[TokenRow]:
        """Return a row, or the rows of a slice."""
        if isinstance(place, slice):
            return [self[number] for number in range(len(self))[place]]
        row = self.data[int(self.order[place])]
        completions, context = (
            tuple(part.values.to_numpy() for part in row[name][0].values[: self.kept])
            for name in ("completions", "context")
        )
        prompt, desirable = row["prompt"][0].values.to_numpy(), row["desirable"][0].as_py()
        return TokenRow(row["id"][0].as_py(), prompt, completions, context, desirable)

    def select(self, places: Sequence[int] | np.ndarray) -> TokenTable:
        """Return a table of the rows at these places."""
        return replace(self, order=self.order[np.asarray(places, np.int64)])

    def first_completions(self, count: int) -> TokenTable:
        """Return a table of the same rows with at most `count` completions each."""
        return replace(self, kept=count)

    @property
    def ids(self) -> list[str]:
        """The ids of the rows."""
        return self._column("id").to_pylist()

    @cached_property
    def labels(self) -> dict[str, float]:
        """1 for each desirable and 0 for each undesirable row by its id. Empty if rows are not labelled."""
        values = self._column("desirable").to_pylist()
        return {each: float(label) for each, label in zip(self.ids, values, strict=True) if label is not None}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the SHA-256 of all rows, which cover ids, tokens and context, in their order."""
        return hashlib.sha256(b"".join(self._column("row").to_pylist())).hexdigest()

    @cached_property
    def tokens(self) -> list[int]:
        """Number of stream positions of each row."""
        column = self.data.data.column("completions")
        counts = pc.list_value_length(column).to_numpy()
        lengths = pc.list_value_length(pc.list_flatten(column)).to_numpy()
        until = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
        first = counts.cumsum(dtype=np.int64) - counts
        used = counts if self.kept is None else counts.clip(max=self.kept)
        prompts = pc.list_value_length(self.data.data.column("prompt")).to_numpy()
        total: list[int] = (prompts + until[first + used] - until[first])[self.order].tolist()
        return total

    def _column(self, name: str) -> Any:
        return self.data.data.column(name).take(self.order)


def arrow_table(rows: Sequence[TokenRow]) -> pa.Table:
    """Return token rows as an Arrow table with the columns `FEATURES`."""
    columns = [[getattr(row, "digest" if name == "row" else name) for row in rows] for name in FEATURES]
    return pa.table(columns, FEATURES.arrow_schema)


def table_key(pairs: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, object]:
    """Return what the token rows of the pairs in a Parquet file depend on."""
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    return {
        "engine": ENGINE_VERSION,
        "pairs": sha256(pairs),
        "tokenizer": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "max_length": max_length,
    }


def write_table(
    folder: Path, pairs: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, *, single: bool = False
) -> None:
    """Encode the canonical pairs of a Parquet file, and write the table `folder` atomically.

    Rows of one completion are demonstrations with `single`, and else labelled rows.

    Raises:
        InputError: a pair cannot be encoded, or all labelled rows have the same prompt.
    """
    key = table_key(pairs, tokenizer, max_length)
    with (
        pq.ParquetFile(pairs, buffer_size=READ_BYTES, pre_buffer=False) as file,
        progress(total=file.metadata.num_rows, desc=f"tokens of {pairs.name}", unit="pair", mininterval=2) as bar,
        atomic_write(folder) as tmp,
    ):
        tmp.mkdir()
        batches = (batch.to_pylist() for batch in file.iter_batches(PAIRS_AT_ONCE))
        rows = _encoded(batches, tokenizer, max_length, None if single else str(pairs))
        with ArrowWriter(features=FEATURES, path=str(tmp / "table.arrow")) as writer:
            while part := list(islice(rows, PAIRS_AT_ONCE)):
                writer.write_table(arrow_table(part))
                bar.update(len(part))
            writer.finalize()
        write_manifest(tmp / "table.arrow", key)


def _encoded(
    batches: Iterator[list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labelled: str | None,
) -> Iterator[TokenRow]:
    """Yield the token rows of canonical rows. `labelled` is the file of rows that may have a label."""
    first = next(batches, [])
    pairs = chain([first], batches)
    if labelled and first and len(completion_fields(first[0])) == 1:
        rows = (
            (row, isinstance(pair["chosen"], str))
            for batch in pairs
            for row, pair in zip(encode_pairs(batch, tokenizer, max_length), batch, strict=True)
        )
        return labelled_rows(rows, max_length, labelled)
    return (row for batch in pairs for row in encode_pairs(batch, tokenizer, max_length))


def open_table(folder: Path, pairs: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenTable:
    """Open the table that was made from these pairs with this tokenizer, memory-mapped.

    Raises:
        InputError: the table is missing, incomplete or altered, or was made from other inputs.
    """
    file = folder / "table.arrow"
    check_manifest(file, table_key(pairs, tokenizer, max_length), "token table", "tokens")
    return TokenTable._of(Dataset.from_file(str(file)))
