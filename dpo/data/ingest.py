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
from dpo.data.labels import LABELLED
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
KIND = "dpo.kind"
"""Key of the raw table's metadata: `labelled` for rows of one completion with a label."""
ONE_LABEL = "rows left out by data.pair_labels: their prompt has no other row with the other label"


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

    Rows of one completion with a label are stored in `chosen` if it is desirable, and else in `rejected`. With
    `data.pair_labels`, they become pairs.

    Raises:
        InputError: the source is unreadable or empty, the layout of a file is unknown, or the source has both
            pairs and labelled rows.
    """
    files: dict[str, FileSummary] = {}
    spelling = Spelling(params.columns, params.roles, params.pairing, single, params.min_desirable_rating)
    pairs = _all_pairs(rows, spelling, 0 if single else params.eval_fraction, files)
    if params.pair_labels and not single:
        pairs = _paired(pairs, files)
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
        labelled = any(LABELLED.keys() & each.layouts.keys() for each in files.values())
        kind = "labelled" if labelled and not params.pair_labels else "pairs"
        summaries = json.dumps({name: vars(each) for name, each in files.items()})
        writer.add_key_value_metadata({FILES: summaries, KIND: kind})
    return files


def read_file_summaries(path: Path) -> dict[str, FileSummary]:
    """Return the summaries that a raw table has in its metadata."""
    stored = json.loads((pq.read_metadata(path).metadata or {}).get(FILES.encode(), b"{}"))
    counted = ("layouts", "unread", "notes")
    return {
        name: FileSummary(**{**values, **{key: Counter(values[key]) for key in counted}})
        for name, values in stored.items()
    }


def is_labelled(path: Path) -> bool:
    """Return whether the rows of a raw table have one completion with a label."""
    metadata = pq.read_metadata(path).metadata or {}
    return metadata.get(KIND.encode()) == b"labelled"


def _all_pairs(
    rows: Iterator[RawRow], spelling: Spelling, eval_fraction: float, files: dict[str, FileSummary]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the raw table, and add a summary of each file to `files`."""
    kinds: dict[bool, str] = {}
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
            yield from _raw_pairs(raw, spelling, layout, eval_fraction, summary, kinds)


def _raw_pairs(
    raw: RawRow,
    spelling: Spelling,
    layout: str,
    eval_fraction: float,
    summary: FileSummary,
    kinds: dict[bool, str],
) -> Iterator[dict[str, Any]]:
    """Yield the pairs of a row. `kinds` has the place of the first row with a label, and of the first without."""
    origin = {"file": raw.file, "line": raw.line, "original": raw.original}
    rule, reason = raw.violation or ("", "")
    if raw.row is not None:
        try:
            converted = convert(raw.row, spelling, layout)
        except RowError as error:
            rule, reason = error.rule, error.reason
        else:
            kinds.setdefault(converted.is_labelled, f"{raw.file}, line {raw.line}")
            if len(kinds) > 1:
                raise InputError(
                    f"{kinds[True]}: a row of one completion with a label; {kinds[False]}: a row with several "
                    "completions. One run trains on pairs or on labelled rows, because their losses differ; use "
                    "one of them as data.source"
                )
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


def _paired(rows: Iterator[dict[str, Any]], files: dict[str, FileSummary]) -> Iterator[dict[str, Any]]:
    """Yield pairs of labelled rows of one prompt: the first desirable with the first undesirable one, and so on.

    A pair has the metadata of its desirable row, and the originals of both. Other rows are left out and counted.
    """
    sides: dict[tuple[str, str], tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for row in rows:
        if row.get("rule"):
            yield row
            continue
        if row["chosen"] is not None and row["rejected"] is not None:
            raise InputError(
                f"{row['file']}, line {row['line']}: a pair, so data.pair_labels has no effect; set it to false"
            )
        asked = json.dumps([row[name] for name in ("turns", "tools", "chat_template_kwargs")])
        group = sides.setdefault((normalize(row["prompt"]), asked), ([], []))
        group[row["chosen"] is None].append(row)
    for desirable, undesirable in sides.values():
        for good, bad in zip(desirable, undesirable, strict=False):
            other = {"rejected": bad["rejected"], "rejected_turns": bad["rejected_turns"]}
            digest = hashlib.sha256(f"{good['id']}\x1f{bad['id']}".encode()).hexdigest()[:16]
            yield good | other | {"id": digest, "original": f"{good['original']}\n{bad['original']}"}
        both = min(len(desirable), len(undesirable))
        for row in (*desirable[both:], *undesirable[both:]):
            files[row["file"]].notes[ONE_LABEL] += 1
