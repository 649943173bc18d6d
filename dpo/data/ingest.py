"""Conversion of a source's rows to the raw table: every row as pairs, or with the rule that it breaks."""

import hashlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.common.progress import progress
from dpo.data.formats import RowError, detect, normalize, to_pairs
from dpo.data.readers import RawRow
from dpo.data.schema import RAW_PAIRS_SCHEMA
from dpo.data.settings import DataSettings

GROUP_ROWS = 4_000
"""Rows per row group. Later steps keep one row group in memory at a time."""
DETECT_ROWS = 1000
"""Number of first rows from which the format is detected."""


def write_raw_pairs(rows: Iterator[RawRow], path: Path, origin: str, params: DataSettings) -> str:
    """Write the raw table of the source `origin` atomically, and return the detected format.

    If a row has no `split`, a hash of the normalized prompt decides, so that added rows do not move old rows to
    the other split. If a row has no `source`, it is the name of the file.

    Raises:
        InputError: the source is unreadable, empty, or in an unknown format.
    """
    first = list(islice(rows, DETECT_ROWS))
    if not first:
        raise InputError(f"{origin}: no rows; add at least one pair for training and one for evaluation")
    readable = [raw.row for raw in first if raw.row is not None]
    if not readable:
        raw = first[0]
        reason = raw.violation and raw.violation[1]
        raise InputError(f"{raw.file}: line {raw.line}: {reason}; none of the first {len(first)} rows is readable")
    form = detect(readable, origin)
    pairs = (pair for raw in chain(first, rows) for pair in _raw_pairs(raw, form, params))
    with (
        atomic_write(path) as tmp,
        pq.ParquetWriter(tmp, RAW_PAIRS_SCHEMA, compression="zstd") as writer,
        progress(desc="rows", unit="row", mininterval=2) as bar,
    ):
        while group := list(islice(pairs, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, RAW_PAIRS_SCHEMA))
            bar.update(len(group))
    return form


def _raw_pairs(raw: RawRow, form: str, params: DataSettings) -> Iterator[dict[str, Any]]:
    origin = {"file": raw.file, "line": raw.line, "original": raw.original}
    rule, reason = raw.violation or ("", "")
    if raw.row is not None:
        try:
            for pair in to_pairs(raw.row, form, params.pairing):
                digest = hashlib.sha256(normalize(pair["prompt"]).encode()).hexdigest()
                is_held_out = int(digest[:8], 16) < params.eval_fraction * 2**32
                pair["split"] = pair["split"] or ("eval" if is_held_out else "train")
                pair["source"] = pair["source"] or Path(raw.file).name
                yield pair | origin
            return
        except RowError as error:
            rule, reason = error.rule, error.reason
    yield origin | {"rule": rule, "reason": reason}
