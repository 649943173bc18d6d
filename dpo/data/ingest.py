"""From the rows of a source to the candidate table: every row as pairs, or with the rule that it breaks."""

import hashlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.data.formats import RowFault, detect, normal, to_pairs
from dpo.data.readers import RawRow
from dpo.data.schema import RAW_PAIRS_SCHEMA
from dpo.data.settings import DataSettings

GROUP_ROWS = 4_000
"""Rows of a row group: what later steps hold in memory at a time."""
DETECT_ROWS = 1000
"""Rows that tell the format."""


def collect(rows: Iterator[RawRow], path: Path, origin: str, params: DataSettings) -> str:
    """Write the candidate table: every row of a source as pairs, or with the rule that it breaks.

    A missing `split` is decided by a hash of the prompt's normal form, so that adding rows moves no old row to the
    other side; a missing `source` is the file's name.

    Args:
        rows: from `dpo.data.readers`.
        path: the candidate table, all or nothing.
        origin: the source's name, for messages.
        params: its pairing and eval fraction are used.

    Returns:
        The format that was detected.

    Raises:
        InputError: the source is unreadable, empty, or of no known format.
    """
    first = list(islice(rows, DETECT_ROWS))
    if not first:
        raise InputError(f"{origin}: no rows; bring at least one pair for training and one for evaluation")
    readable = [raw.row for raw in first if raw.row is not None]
    if not readable:
        fault = first[0]
        raise InputError(f"{fault.file}: line {fault.line}: {fault.fault and fault.fault[1]}; no row is readable")
    form = detect(readable, origin)
    with atomic_write(path) as tmp, pq.ParquetWriter(tmp, RAW_PAIRS_SCHEMA, compression="zstd") as writer:
        pairs = (pair for raw in chain(first, rows) for pair in _candidates(raw, form, params))
        bar = tqdm(desc="rows", unit="row", mininterval=2)
        while group := list(islice(pairs, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, RAW_PAIRS_SCHEMA))
            bar.update(len(group))
        bar.close()
    return form


def _candidates(raw: RawRow, form: str, params: DataSettings) -> Iterator[dict[str, Any]]:
    place = {"file": raw.file, "line": raw.line, "original": raw.original}
    rule, reason = raw.fault or ("", "")
    if raw.row is not None:
        try:
            for pair in to_pairs(raw.row, form, params.pairing):
                pair["split"] = pair["split"] or _split(pair["prompt"], params.eval_fraction)
                pair["source"] = pair["source"] or Path(raw.file).name
                yield pair | place
            return
        except RowFault as fault:
            rule, reason = fault.rule, fault.reason
    yield place | {"rule": rule, "reason": reason}


def _split(prompt: str, eval_fraction: float) -> str:
    digest = hashlib.sha256(normal(prompt).encode()).hexdigest()
    return "eval" if int(digest[:8], 16) < eval_fraction * 2**32 else "train"
