"""Conversion of a source's rows to the raw table: every row as pairs, or with the rule that it breaks."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.common.progress import progress
from dpo.data.formats import Spelling, convert, detect, normalize
from dpo.data.readers import RawRow
from dpo.data.schema import RAW_PAIRS_SCHEMA, as_columns
from dpo.data.settings import DataSettings
from dpo.data.turns import RowError

GROUP_ROWS = 4_000
"""Rows per row group. Later steps keep one row group in memory at a time."""
DETECT_ROWS = 1000
"""Number of first rows of a file from which its usual layout is detected."""
FILES = "dpo.files"
"""Key of the raw table's metadata: what was read of each file, as JSON."""


@dataclass
class FileSummary:
    """What was read of one file."""

    rows: int = 0
    left_out: int = 0
    """Number of rows that the share of their source leaves out."""
    layouts: Counter[str] = field(default_factory=Counter)
    """Number of converted rows by layout."""
    unread: Counter[str] = field(default_factory=Counter)
    """Number of rows by field that has a value and was not read."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of rows by what was removed from their texts."""


def write_raw_pairs(
    rows: Iterator[RawRow], path: Path, origin: str, params: DataSettings, *, single: bool = False
) -> dict[str, FileSummary]:
    """Write the raw table of the source `origin` atomically. Return a summary of each file, as in its metadata.

    With `single`, rows are demonstrations, which have one completion and no hash of the prompt as their split.

    If a row has no `split`, a hash of the normalized prompt decides, so that added rows do not move old rows to
    the other split. If a row has no `source`, it is the name of its source, if there are several, or of the file.

    Raises:
        InputError: the source is unreadable or empty, or the layout of a file is unknown.
    """
    files: dict[str, FileSummary] = {}
    spelling = Spelling(params.columns, params.roles, params.pairing, single)
    pairs = _all_pairs(rows, spelling, 0 if single else params.eval_fraction, files)
    first = list(islice(pairs, GROUP_ROWS))
    if not first:
        needed = "demonstration" if single else "pair for training and one for evaluation"
        raise InputError(f"{origin}: no rows; add at least one {needed}")
    with (
        atomic_write(path) as tmp,
        pq.ParquetWriter(tmp, RAW_PAIRS_SCHEMA, compression="zstd") as writer,
        progress(desc="rows", unit="row", mininterval=2) as bar,
    ):
        group = first
        while group:
            writer.write_table(pa.Table.from_pylist(group, RAW_PAIRS_SCHEMA))
            bar.update(len(group))
            group = list(islice(pairs, GROUP_ROWS))
        writer.add_key_value_metadata({FILES: json.dumps({name: vars(each) for name, each in files.items()})})
    return files


def read_file_summaries(path: Path) -> dict[str, FileSummary]:
    """Return the summaries that a raw table has in its metadata."""
    stored = json.loads((pq.read_metadata(path).metadata or {}).get(FILES.encode(), b"{}"))
    counted = ("layouts", "unread", "notes")
    return {
        name: FileSummary(**{**values, **{key: Counter(values[key]) for key in counted}})
        for name, values in stored.items()
    }


def _all_pairs(
    rows: Iterator[RawRow], spelling: Spelling, eval_fraction: float, files: dict[str, FileSummary]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the raw table, and add a summary of each file to `files`."""
    for name, group in groupby(rows, attrgetter("file")):
        first = list(islice(group, DETECT_ROWS))
        readable = [raw.row for raw in first if raw.row is not None]
        if readable:
            layout = detect(readable, name, spelling)
        elif not files:
            raw = first[0]
            reason = raw.violation and raw.violation[1]
            raise InputError(f"{name}: line {raw.line}: {reason}; none of the first {len(first)} rows is readable")
        summary = files.setdefault(name, FileSummary())
        for raw in chain(first, group):
            summary.rows += 1
            if not raw.is_used:
                summary.left_out += 1
                continue
            yield from _raw_pairs(raw, spelling, layout, eval_fraction, summary)


def _raw_pairs(
    raw: RawRow, spelling: Spelling, layout: str, eval_fraction: float, summary: FileSummary
) -> Iterator[dict[str, Any]]:
    origin = {"file": raw.file, "line": raw.line, "original": raw.original}
    rule, reason = raw.violation or ("", "")
    if raw.row is not None:
        try:
            converted = convert(raw.row, spelling, layout)
        except RowError as error:
            rule, reason = error.rule, error.reason
        else:
            summary.layouts[converted.layout] += 1
            summary.unread.update(converted.unread)
            summary.notes.update(converted.notes)
            for pair in converted.pairs:
                digest = hashlib.sha256(normalize(pair["prompt"]).encode()).hexdigest()
                is_held_out = int(digest[:8], 16) < eval_fraction * 2**32
                pair["split"] = pair["split"] or ("eval" if is_held_out else "train")
                pair["source"] = pair["source"] or raw.source or Path(raw.file).name
                yield as_columns(pair) | origin
            return
    yield origin | {"rule": rule, "reason": reason}
