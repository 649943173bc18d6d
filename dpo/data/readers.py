"""Where preference data comes from: files, folders, hub data sets and the default data, read row by row.

A source yields raw rows with the place where each stood, so that every later message and the quarantine can name
it. What makes a whole file unreadable is an error; what makes one row unreadable is a fault of that row.
"""

import csv
import gzip
import io
import json
import reprlib
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.bundled import RATINGS_SDIST, fetch
from dpo.common.errors import InputError
from dpo.data.formats import SPLITS, Row, given
from dpo.data.human_ratings import rating_pairs, read_ratings
from dpo.data.settings import DataSettings

OWN_DATA = Path("data/own")
LONGEST_LINE = 64 * 2**20
"""Bytes of one JSONL line or CSV record; a longer one is no row but a file without line ends."""
LARGEST_WHOLE = 512 * 2**20
"""Bytes of what must be held in memory as a whole: a JSON array, Parquet inside gzip. JSONL has no such limit."""
ROWS_AT_ONCE = 1000
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
LISTS = {"completions", "responses", "scores", "ratings", "ranks", "rankings"}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stood in its file, or the fault that makes it unreadable."""

    file: str
    line: int
    """From 1; of a CSV record its last line, of a row in Parquet, in a JSON array or on a hub its number."""
    row: Row | None
    original: str
    """The row as text: the line itself, or JSON of the row."""
    fault: tuple[str, str] | None = None
    """Rule and reason, where `row` is None."""


def read_source(params: DataSettings, seed: int) -> Iterator[RawRow]:
    """The rows of `params.source`.

    Raises:
        InputError: the source is not there, cannot be read, or lies where DVC does not watch it; names it and the
            mend.
    """
    names = [params.source] if isinstance(params.source, str) else list(params.source)
    local = [name for name in names if name != "default" and is_local(name)]
    if params.revision is not None and (local or names == ["default"]):
        raise InputError("params.yaml: data.revision has no effect: data.source is no hub id; set it to null")
    if names == ["default"]:
        return _default(params, seed)
    if len(local) == len(names):
        for name in names:
            place = Path(name).absolute()
            if ".." in place.parts or OWN_DATA.absolute() not in (place, *place.parents):
                raise InputError(
                    f"params.yaml: data.source: {name} is outside {OWN_DATA}/, the folder that DVC watches; "
                    f"copy it there and name it as {OWN_DATA / Path(name).name}"
                )
        return read_files(names)
    if len(names) > 1:
        raise InputError("params.yaml: data.source: a list may hold files and folders only")
    return _hub(names[0], params.revision)


def is_local(name: str) -> bool:
    """Whether a name is that of a file or a folder and not of a hub data set."""
    return Path(name).exists() or _kind(Path(name)) is not None


def read_files(names: Iterable[str]) -> Iterator[RawRow]:
    """The rows of files, of folders of files and of saved data sets.

    Where a folder's files are named for splits (`train.jsonl`, `test-0001.parquet`), their rows have these splits.

    Raises:
        InputError: a file is missing or unreadable, or a folder holds no data.
    """
    for name in names:
        path = Path(name)
        if not path.exists():
            raise InputError(f"{name}: no such file or folder; check the name, or put your data under {OWN_DATA}/")
        if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            yield from _saved_dataset(path)
            continue
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p)) if path.is_dir() else [path]
        if not files:
            raise InputError(
                f"{name}: a folder without data; it needs files that end in {', '.join(READERS)}, or .gz"
            )
        splits = {file: _split_of_name(file) for file in files} if path.is_dir() else {}
        named = "eval" in splits.values()
        for file in files:
            yield from _with_split(_read_file(file), (splits[file] or "train") if named else None, path.name)


def _kind(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in READERS else None


def _split_of_name(path: Path) -> str | None:
    word = "".join(c if c.isalpha() else " " for c in path.name.split(".")[0].lower()).split()
    return SPLITS.get(word[0]) if word else None


def _with_split(rows: Iterable[RawRow], split: str | None, source: str) -> Iterator[RawRow]:
    """Rows with the split and the source that they have by where they stand, unless they say otherwise."""
    if split is None:
        yield from rows
        return
    for raw in rows:
        if raw.row is None:
            yield raw
        else:
            by_place = {"split": split, "source": source}
            added = {field: value for field, value in by_place.items() if given(raw.row, field) is None}
            yield RawRow(raw.file, raw.line, {**raw.row, **added}, raw.original)


def _read_file(path: Path) -> Iterator[RawRow]:
    kind = _kind(path)
    if kind is None:
        raise InputError(f"{path}: unknown kind of file; accepted are {', '.join(READERS)}, each also with .gz")
    try:
        with path.open("rb") as stored, gzip.open(stored) if path.suffix == ".gz" else stored as file:
            if kind != ".parquet" and file.peek(2)[:2] in UTF16:
                raise InputError(f"{path}: the file is UTF-16; save it as UTF-8")
            name = str(path).encode(errors="backslashreplace").decode()
            yield from READERS[kind](cast("BinaryIO", file), name)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        what = f"{kind} file in gzip" if path.suffix == ".gz" else f"{kind} file"
        raise InputError(f"{path}: not a whole, readable {what}: {' '.join(str(error).split())}") from error


def _jsonl(file: BinaryIO, name: str) -> Iterator[RawRow]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{name}: line {number} is longer than {LONGEST_LINE // 2**20} MiB; JSONL has one object a line"
            )
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield _parsed(line.strip(), name, number)


def _parsed(line: bytes, name: str, number: int) -> RawRow:
    original = line.decode(errors="backslashreplace")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode())  # takes NaN, large numbers and lone surrogates, which orjson refuses
        except UnicodeDecodeError as error:
            fault = f"byte {line[error.start]:#x} at column {error.start + 1} is no UTF-8"
            return RawRow(name, number, None, original, ("invalid_utf8", fault))
        except (ValueError, RecursionError) as error:
            return RawRow(name, number, None, original, ("unreadable_row", f"not JSON: {error}"))
    if not isinstance(row, dict):
        return RawRow(
            name, number, None, original, ("unreadable_row", f"a JSON {type(row).__name__}, not an object")
        )
    return RawRow(name, number, row, original)


def _json(file: BinaryIO, name: str) -> Iterator[RawRow]:
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    if start.startswith(b"{"):  # JSON lines under the name of JSON, as many data sets have it
        yield from _jsonl(file, name)
        return
    content = _whole(file, f"{name}: a JSON array", "save it as JSONL")
    try:
        rows = json.loads(content.removeprefix(BOM).decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not a whole JSON file: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{name}: a JSON {type(rows).__name__}; it must be an array of objects")
    yield from _numbered(rows, name)


def _whole(file: BinaryIO, what: str, mend: str) -> bytes:
    content = file.read(LARGEST_WHOLE + 1)
    if len(content) > LARGEST_WHOLE:
        raise InputError(f"{what} of more than {LARGEST_WHOLE // 2**20} MiB; {mend}")
    return content


def _csv(file: BinaryIO, name: str) -> Iterator[RawRow]:
    csv.field_size_limit(LONGEST_LINE)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(_short_lines(text, name), strict=True)
    try:
        header = next(reader, [])
        if len(header) < 2:
            other = next((sign for sign in (";", "\t", "|") if sign in "".join(header)), None)
            mend = f"its delimiter seems to be {other!r}; save it with commas" if other else "it has no commas"
            raise InputError(f"{name}: not a CSV file with the columns of preference data: {mend}")
        ((field, count),) = Counter(header).most_common(1)
        if count > 1:
            raise InputError(f"{name}: the column name {field[:40]!r} stands twice in the header")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                fault = f"{len(values)} fields, the header has {len(header)}"
                yield RawRow(name, reader.line_num, None, _text_of(values), ("unreadable_row", fault))
            else:
                original = _text_of(dict(zip(header, values, strict=True)))
                row = {field: _cell(field, value) for field, value in zip(header, values, strict=True)}
                yield RawRow(name, reader.line_num, row, original)
    except csv.Error as error:
        raise InputError(f"{name}: line {reader.line_num}: not CSV: {error}") from error


def _short_lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    while line := text.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"{name}: a line is longer than {LONGEST_LINE // 2**20} MiB; CSV has one row a line")
        yield line


def _cell(field: str, value: str) -> Any:
    """A cell's text; where a list belongs, or conversations, the JSON in it."""
    if value.startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if field in LISTS or (isinstance(parsed, list) and parsed and all(isinstance(t, dict) for t in parsed)):
            return parsed
    return value


def _parquet(file: BinaryIO, name: str) -> Iterator[RawRow]:
    packed = isinstance(file, gzip.GzipFile)
    content: Any = io.BytesIO(_whole(file, f"{name}: Parquet in gzip", "unpack it")) if packed else file
    yield from _numbered(_of_arrow(pq.ParquetFile(content).iter_batches(batch_size=ROWS_AT_ONCE)), name)


def _of_arrow(batches: Iterable[Any]) -> Iterator[Any]:
    """The rows of batches, in place of a row that Python cannot hold the error that says so."""
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, times beyond the year 9999
            rows = [error] if len(batch) == 1 else _of_arrow(batch.slice(i, 1) for i in range(len(batch)))
        yield from rows


READERS: dict[str, Callable[[BinaryIO, str], Iterator[RawRow]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _numbered(rows: Iterable[Any], name: str) -> Iterator[RawRow]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield RawRow(name, number, row, _text_of(row))
        elif isinstance(row, UnicodeDecodeError):
            original = row.object.decode(errors="backslashreplace")
            yield RawRow(name, number, None, original, ("invalid_utf8", str(row)))
        else:
            what = str(row) if isinstance(row, Exception) else f"{type(row).__name__}, no object"
            yield RawRow(name, number, None, _text_of(row), ("unreadable_row", what))


def _text_of(row: Any) -> str:
    try:
        return orjson.dumps(row, default=str).decode()
    except (TypeError, orjson.JSONEncodeError):  # lone surrogates, keys that are no text
        try:
            return json.dumps(row, default=str)
        except RecursionError:
            return reprlib.repr(row)


def _saved_dataset(path: Path) -> Iterator[RawRow]:
    from datasets import load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, DatasetsError) as error:
        raise InputError(f"{path}: not a whole saved data set: {error}") from error
    yield from _dataset_rows(loaded, str(path))


def _hub(name: str, revision: str | None) -> Iterator[RawRow]:
    import datasets

    if revision is None:
        raise InputError(
            f"params.yaml: data.source: '{name}' is neither `default` nor a file or folder here, so it is taken "
            "for a hub id, which needs data.revision: without one nobody can reproduce the run"
        )
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"params.yaml: data.source: cannot load '{name}' at '{revision}': {error}") from error
    return _dataset_rows(loaded, name)


def _dataset_rows(loaded: Any, name: str) -> Iterator[RawRow]:
    parts = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits = {part: _split_of_name(Path(part)) for part in parts}
    ready = "eval" in splits.values() and len(parts) > 1
    for part, data in parts.items():
        rows = _numbered(_of_arrow(data.with_format("arrow").iter(ROWS_AT_ONCE)), f"{name}:{part}")
        yield from _with_split(rows, (splits[part] or "train") if ready else None, name)


def _default(params: DataSettings, seed: int) -> Iterator[RawRow]:
    with tempfile.TemporaryDirectory() as folder:
        domains = read_ratings(fetch(RATINGS_SDIST, Path(folder), source=True))
    table = rating_pairs(
        domains, min_rating_gap=params.min_rating_gap, eval_fraction=params.eval_fraction, seed=seed
    )
    return _numbered(table.to_dict("records"), RATINGS_SDIST[0])
