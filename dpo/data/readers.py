"""Readers of preference data: files, folders and data sets, row by row.

Readers yield each row with its file and line, for messages and the quarantine. Unreadable files raise InputError.
Unreadable rows are yielded with the rule that they break.
"""

import csv
import gzip
import io
import json
import math
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import InputError
from dpo.data.formats import SPLITS, Row

OWN_DATA = Path("data/own")
MAX_LINE_BYTES = 64 * 2**20
"""Maximum size of a JSONL line or CSV record. Longer ones come from files without line ends."""
MAX_LOADED_BYTES = 512 * 2**20
"""Maximum size of data that is loaded at once: JSON arrays and Parquet in gzip. JSONL has no such limit."""
BATCH_ROWS = 1000
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a source, or the reason why it is unreadable."""

    file: str
    line: int
    """From 1: the line (the last one of a CSV record), or the row number in Parquet, JSON arrays and data sets."""
    row: Row | None
    original: str
    """The row as text: the line of a JSONL file, or the row as JSON."""
    violation: tuple[str, str] | None = None
    """Rule and reason, if `row` is None."""
    source: str | None = None
    """Name of its source, if there are several."""
    is_used: bool = True
    """False if the share of its source leaves it out."""


def read_files(names: Iterable[str], splits: Collection[str] = ()) -> Iterator[RawRow]:
    """Read the rows of files, folders and saved data sets. `splits` selects parts of folders and data sets.

    If a folder's files are named after splits (`train.jsonl`, `test-0001.parquet`), their rows get these splits.

    Raises:
        InputError: a file is missing or unreadable, or a folder contains no data.
    """
    for name in names:
        path = Path(name)
        if not path.exists():
            raise InputError(f"{name}: no such file or folder; check the name, or put your data into {OWN_DATA}/")
        files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file))
        if not path.is_dir():
            yield from _read_file(path)
        elif any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            yield from _saved_dataset(path, splits)
        elif files:
            parts = {file: _read_file(file) for file in files}
            yield from _with_splits(_chosen(parts, splits, str(path)), path.name)
        else:
            endings = ", ".join(READERS)
            raise InputError(f"{name}: the folder contains no data; add files that end in {endings}, or .gz")


def kind_of(path: Path) -> str | None:
    """Return the ending by which a file is read, a key of `READERS`, or None."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in READERS else None


def _chosen(parts: dict[Path, Any], splits: Collection[str], name: str) -> dict[Path, Any]:
    """Return the parts of a folder or a data set in `splits`, for example `train_prefs-00000-of-00001.parquet`.

    Raises:
        InputError: a split has no part.
    """
    named = {part: re.split(r"-\d+|\.", part.name)[0] for part in parts}
    if missing := set(splits) - set(named.values()):
        found = ", ".join(sorted(set(named.values())))
        raise InputError(f"params.yaml: data.split: {name} has no split '{min(missing)}'; use {found}")
    return {part: rows for part, rows in parts.items() if not splits or named[part] in splits}


def _split_of_name(path: Path) -> str | None:
    word = "".join(c if c.isalpha() else " " for c in path.name.split(".")[0].lower()).split()
    return SPLITS.get(word[0]) if word else None


def _with_splits(parts: Mapping[Path, Iterable[RawRow]], source: str) -> Iterator[RawRow]:
    """Read all parts. If the name of one means `eval`, add split and source to rows that do not have them."""
    splits = {part: _split_of_name(part) for part in parts}
    use_names = "eval" in splits.values()
    for part, rows in parts.items():
        defaults = {"split": splits[part] or "train", "source": source}
        for raw in rows:
            if use_names and raw.row is not None:
                added = {field: value for field, value in defaults.items() if _optional(raw.row, field) is None}
                raw = replace(raw, row={**raw.row, **added})
            yield raw


def _read_file(path: Path) -> Iterator[RawRow]:
    kind = kind_of(path)
    if kind is None:
        raise InputError(f"{path}: unknown file type; use {', '.join(READERS)}, each also with .gz")
    try:
        with path.open("rb") as stored, gzip.open(stored) if path.suffix == ".gz" else stored as file:
            if kind != ".parquet" and file.peek(2)[:2] in UTF16:
                raise InputError(f"{path}: the file is UTF-16; save it as UTF-8")
            name = str(path).encode(errors="backslashreplace").decode()
            yield from READERS[kind](cast("BinaryIO", file), name)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        what = f"{kind} file in gzip" if path.suffix == ".gz" else f"{kind} file"
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a complete, readable {what}: {reason}; copy or export it again") from error


def _jsonl(file: BinaryIO, name: str) -> Iterator[RawRow]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            size = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise InputError(f"{name}: line {number} is longer than {size}; write one object per line")
        text = line.removeprefix(BOM if number == 1 else b"").strip()
        if text:
            row, violation = _parse(text)
            yield RawRow(name, number, row, text.decode(errors="backslashreplace"), violation)


def _parse(line: bytes) -> tuple[Row | None, tuple[str, str] | None]:
    """Return the object of a JSON line, or the rule that the line breaks with the reason."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode())  # accepts NaN, large numbers and lone surrogates, which orjson rejects
        except UnicodeDecodeError as error:
            return None, ("invalid_utf8", f"byte {line[error.start]:#x} at column {error.start + 1} is not UTF-8")
        except (ValueError, RecursionError) as error:
            return None, ("unreadable_row", f"not JSON: {error}")
    if isinstance(row, dict):
        return row, None
    return None, ("unreadable_row", f"a JSON {type(row).__name__}, not an object")


def _json(file: BinaryIO, name: str) -> Iterator[RawRow]:
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    if start.startswith(b"{"):  # JSON lines, which many data sets name .json
        yield from _jsonl(file, name)
        return
    content = _read_all(file, f"{name}: a JSON array", "save it as JSONL")
    try:
        rows = json.loads(content.removeprefix(BOM).decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not a complete JSON file: {error}; copy or export it again") from error
    if not isinstance(rows, list):
        raise InputError(f"{name}: a JSON {type(rows).__name__}; save an array of objects")
    yield from numbered(rows, name)


def _read_all(file: BinaryIO, what: str, fix: str) -> bytes:
    content = file.read(MAX_LOADED_BYTES + 1)
    if len(content) > MAX_LOADED_BYTES:
        raise InputError(f"{what} of more than {MAX_LOADED_BYTES // 2**20} MiB; {fix}")
    return content


def _csv(file: BinaryIO, name: str) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(_short_lines(text, name), strict=True)
    try:
        header = next(reader, [])
        if len(header) < 2:
            other = next((sign for sign in (";", "\t", "|") if sign in "".join(header)), None)
            reason = f"the delimiter seems to be {other!r}" if other else "the header has no commas"
            raise InputError(f"{name}: not a CSV file with the columns of preference data: {reason}; use commas")
        ((field, count),) = Counter(header).most_common(1)
        if count > 1:
            raise InputError(f"{name}: the header has column {field[:40]!r} twice; rename one")
        for values in filter(None, reader):
            if len(values) != len(header):
                reason = f"{len(values)} fields, the header has {len(header)}"
                yield RawRow(name, reader.line_num, None, _as_text(values), ("unreadable_row", reason))
            else:
                row = dict(zip(header, values, strict=True))
                yield RawRow(name, reader.line_num, row, _as_text(row))
    except csv.Error as error:
        raise InputError(f"{name}: line {reader.line_num}: not CSV: {error}") from error


def _short_lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    while line := text.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            size = f"{MAX_LINE_BYTES // 2**20} MiB"
            raise InputError(f"{name}: a line is longer than {size}; write one row per line")
        yield line


def _parquet(file: BinaryIO, name: str) -> Iterator[RawRow]:
    if isinstance(file, gzip.GzipFile):
        file = io.BytesIO(_read_all(file, f"{name}: Parquet in gzip", "unpack it"))
    yield from numbered(_arrow_rows(pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS)), name)


def _arrow_rows(batches: Iterable[Any]) -> Iterator[Any]:
    """Return the rows of Arrow batches; for a row that Python cannot represent, the exception."""
    for batch in batches:
        try:
            rows = batch.to_pylist()
            if nested := [field.name for field in batch.schema if pa.types.is_nested(field.type)]:
                rows = [{**row, **{name: _without_padding(row[name]) for name in nested}} for row in rows]
        except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, dates after the year 9999
            rows = [error] if len(batch) == 1 else _arrow_rows(batch.slice(i, 1) for i in range(len(batch)))
        yield from rows


def _without_padding(value: Any) -> Any:
    """Return a value without the nulls that Arrow adds to objects, so that all have the same keys."""
    if isinstance(value, dict):
        return {key: _without_padding(inner) for key, inner in value.items() if inner is not None}
    return [_without_padding(item) for item in value] if isinstance(value, list) else value


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def numbered(rows: Iterable[Any], name: str) -> Iterator[RawRow]:
    """Yield rows with their numbers, from 1."""
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield RawRow(name, number, row, _as_text(row))
        elif isinstance(row, UnicodeDecodeError):
            original = row.object.decode(errors="backslashreplace")
            yield RawRow(name, number, None, original, ("invalid_utf8", str(row)))
        else:
            reason = str(row) if isinstance(row, Exception) else f"{type(row).__name__}, not an object"
            yield RawRow(name, number, None, _as_text(row), ("unreadable_row", reason))


def _as_text(row: Any) -> str:
    try:
        return orjson.dumps(row, default=str).decode()
    except (TypeError, orjson.JSONEncodeError):  # lone surrogates, keys that are not strings
        try:
            return json.dumps(row, default=str)
        except RecursionError:
            return reprlib.repr(row)


def _saved_dataset(path: Path, splits: Collection[str]) -> Iterator[RawRow]:
    from datasets import load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, DatasetsError) as error:
        raise InputError(f"{path}: not a complete saved data set: {error}; save it again") from error
    yield from dataset_rows(loaded, str(path), splits)


def dataset_rows(loaded: Any, name: str, splits: Collection[str]) -> Iterator[RawRow]:
    """Read the rows of a data set, or of the parts of one in `splits`."""
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    rows = {
        Path(part): numbered(_arrow_rows(data.with_format("arrow").iter(BATCH_ROWS)), f"{name}:{part}")
        for part, data in parts.items()
    }
    rows = _chosen(rows, splits, name)
    yield from _with_splits(rows, name) if len(rows) > 1 else chain(*rows.values())


def _optional(row: Row, name: str) -> Any:
    """Return the value of an optional field. An empty string or NaN, which tables use for no value, gives None."""
    value = row.get(name)
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value
