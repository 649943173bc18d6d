"""Check new data files together with the data of the project: `python -m tasks.commands.landed FOLDER`.

A fault belongs to a file only if the data without the file is valid. A fault that the data has without the new
files, or that a plain pair has too, is one of settings, model or template, and ends the command with an error.

`FOLDER/request.json` has the names of the files by path, for messages. `FOLDER/result.json` has for each file that
can be used `{path, rows, known}`: the file to take in, and the numbers of its rows and of those that the data has
already. For each other file it has `{reason}`.
"""

import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.data.formats import PAIR_TEXTS, normalize
from dpo.data.ingest import GROUP_ROWS, write_raw_pairs
from dpo.data.readers import READERS, RawRow, read_files
from dpo.data.rules import ROW_RULES
from dpo.data.schema import RAW_PAIRS_SCHEMA
from dpo.data.sources import read_source
from dpo.data.validate import validate
from tasks.common.paths import BASE, BENCHMARKS
from tasks.common.runner import run
from tasks.validate import committed_profile

REQUEST, RESULT = "request.json", "result.json"
PROBE = {"prompt": "Say hello.", "chosen": "Hello.", "rejected": "No."}


class TimeUp(BaseException):
    """The time limit of a file is over. It is no Exception, so that no reader takes it for a fault of a row."""


@dataclass(frozen=True)
class NewFile:
    """A new file whose rows are readable."""

    path: Path
    name: str
    """Its place in the landing folder."""
    table: Path
    """Its pairs as a raw table."""
    lines: list[tuple[int, frozenset[int]]]
    """For each row: its line, and the hashes of its pairs; no hashes if it breaks a rule."""

    def new_lines(self, known: set[int]) -> set[int]:
        """Return the lines of the rows that have a pair which is not in `known`, and add their pairs to it."""
        fresh = {line for line, pairs in self.lines if not pairs or not pairs <= known}
        known.update(*(pairs for _, pairs in self.lines))
        return fresh


class Checker:
    """Check new files against the data of the project. Temporary tables are written to a folder."""

    def __init__(self, params: Params, work: Path) -> None:
        self.params, self.work = params, work
        self.tokenizer = BASE if BASE.is_dir() else None
        self.base = work / "data.parquet"
        self.refused: dict[Path, str] = {}
        self.known = set[int]()  # hashes of the pairs of the data

    def check(self, files: dict[Path, str]) -> dict[str, dict[str, Any]]:
        """Return the result for files that are given with their names, in whose order they are accepted.

        Raises:
            InputError: the data is invalid without the new files, or settings, model or template are.
        """
        self._check_probe()
        data = self.params.data
        existing = tuple(each for each in data.sources if each.path is None or has_data(Path(each.path)))
        self.base.unlink(missing_ok=True)
        if existing:
            rows = read_source(replace(data, source=existing), self.params.seed)
            write_raw_pairs(rows, self.base, data.origin, data)
        self.known = {pair for _, pairs in hashed_rows(self.base) for pair in pairs} if existing else set()
        ordered = sorted(files.items(), key=itemgetter(1))
        readable = [file for number, item in enumerate(ordered) if (file := self._read(number, *item))]
        usable = self._valid(readable)
        known = set(self.known)
        found = {str(file.path): self._take(file, file.new_lines(known)) for file in usable}
        return found | {str(path): {"reason": reason} for path, reason in self.refused.items()}

    def _check_probe(self) -> None:
        """Raise InputError if a plain pair breaks a rule: settings, model or template are at fault."""
        table, data = self.work / "probe.parquet", replace(self.params.data, columns={}, roles={})
        write_raw_pairs(iter([RawRow("a plain pair", 1, PROBE, json.dumps(PROBE))]), table, "probe", data)
        errors, quarantined = self._validate(table)
        if errors or len(quarantined):
            reasons = "; ".join([*quarantined["reason"], *errors])
            fix = "correct params.yaml, or the tokenizer and the chat template of the model"
            raise InputError(
                f"settings or model are invalid, because a plain pair breaks a rule: {reasons}; {fix}"
            )

    def _read(self, number: int, path: Path, name: str) -> NewFile | None:
        """Convert a file, or refuse it."""
        table, limits = self.work / f"new-{number}.parquet", self.params.run
        try:
            with time_limit(limits.landed_minutes * 60):
                rows = (replace(row, file=name) for row in read_files([str(path)]))
                write_raw_pairs(limited(rows, limits.landed_mib), table, name, self.params.data)
                lines = list(hashed_rows(table))
        except InputError as error:
            self.refused[path] = str(error).replace(str(path), name)
            return None
        except TimeUp:
            fix = "split the file, or raise run.landed_minutes"
            self.refused[path] = f"{name}: not read after {limits.landed_minutes:g} minutes; {fix}"
            return None
        return NewFile(path, name, table, lines)

    def _valid(self, files: list[NewFile]) -> list[NewFile]:
        """Return the files with which the data is valid; refuse the others."""
        if not files:
            return []
        _, quarantined = self._validate_with(files)
        by_row = quarantined[quarantined["rule"].isin(list(ROW_RULES))]
        bad = {file.path: reason for file in files if (reason := self._fault(file, by_row))}
        self.refused |= bad
        usable = self._fitting([], [file for file in files if file.path not in bad])
        if len(usable) < len(files) and self.base.exists() and (errors := self._validate(self.base)[0]):
            raise InputError("\n".join(["the data is invalid without the new files:", *errors]))
        return usable

    def _fitting(self, accepted: list[NewFile], files: list[NewFile]) -> list[NewFile]:
        """Return the files that do not break the data with those accepted before, by bisection."""
        if not files:
            return []
        errors, quarantined = self._validate_with([*accepted, *files])
        errors = [fault for file in [*files, *accepted] if (fault := self._fault(file, quarantined))] + errors
        if not errors:
            return files
        if len(files) == 1:
            self.refused[files[0].path] = errors[0]
            return []
        half = len(files) // 2
        first = self._fitting(accepted, files[:half])
        return first + self._fitting([*accepted, *first], files[half:])

    def _fault(self, file: NewFile, quarantined: pd.DataFrame) -> str | None:
        """Return why a file cannot be used, from the rows that were quarantined, or None."""
        rows = quarantined[quarantined["file"] == file.name].drop_duplicates("line")
        limit, actions = self.params.validate.max_quarantined, self.params.validate.actions
        stopping = rows[rows["rule"].isin([rule for rule, action in actions.items() if action == "error"])]
        if len(stopping) == 0 and len(rows) <= limit * len(file.lines):
            return None
        first = (rows if stopping.empty else stopping).iloc[0]
        counts = ", ".join(f"{rule} {count}" for rule, count in rows["rule"].value_counts().items())
        shown = f"{file.name}, line {first['line']}: {first['reason']}"
        return f"{shown}; {len(rows)} of {len(file.lines)} rows are invalid ({counts}), the maximum is {limit:.1%}"

    def _validate_with(self, files: Sequence[NewFile]) -> tuple[list[str], pd.DataFrame]:
        """Validate the data together with the new rows of files."""
        union, known = self.work / "union.parquet", set(self.known)
        parts = [(self.base, None), *((file.table, file.new_lines(known)) for file in files)]
        with pq.ParquetWriter(union, RAW_PAIRS_SCHEMA) as writer:
            waiting = RAW_PAIRS_SCHEMA.empty_table()
            for table, lines in parts if self.base.exists() else parts[1:]:
                for batch in pq.ParquetFile(table).iter_batches(GROUP_ROWS):
                    mask = [lines is None or line in lines for line in batch["line"].to_pylist()]
                    rows = pa.Table.from_batches([batch.filter(pa.array(mask))]).cast(RAW_PAIRS_SCHEMA)
                    waiting = pa.concat_tables([waiting, rows])
                    if len(waiting) >= GROUP_ROWS:  # few large groups; the files may be small
                        writer.write_table(waiting)
                        waiting = RAW_PAIRS_SCHEMA.empty_table()
            writer.write_table(waiting)
        return self._validate(union)

    def _validate(self, table: Path) -> tuple[list[str], pd.DataFrame]:
        """Return the errors of a raw table, and its quarantined rows. An empty split is no error of a file."""
        outputs = {name: self.work / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
        if not pq.read_metadata(table).num_rows:
            return [], pd.DataFrame(columns=RAW_PAIRS_SCHEMA.names)
        try:
            result = validate(
                table,
                self.params.validate,
                tokenizer=self.tokenizer,
                max_length=self.params.engine.max_length,
                benchmarks=BENCHMARKS,
                caps={"train": None, "eval": None},
                seed=self.params.seed,
                origin=self.params.data.origin,
                previous=committed_profile(),
                outputs=outputs,
            )
        except InputError as error:
            return [str(error)], pd.DataFrame(columns=RAW_PAIRS_SCHEMA.names)
        errors = [error.message for error in result.errors if error.code != "empty_split"]
        return errors, pd.read_parquet(outputs["quarantine"], columns=["file", "line", "rule", "reason"])

    def _take(self, file: NewFile, fresh: set[int]) -> dict[str, Any]:
        """Return the result for a file that can be used. Rows that the data has are left out of a copy."""
        path, known = file.path, len(file.lines) - len(fresh)
        if fresh and known:
            path = self.work / f"{file.path.name.removesuffix('.jsonl')}.jsonl"
            originals: dict[int, str] = {}
            for batch in pq.ParquetFile(file.table).iter_batches(GROUP_ROWS, columns=["line", "original"]):
                originals |= dict(zip(batch["line"].to_pylist(), batch["original"].to_pylist(), strict=True))
            with atomic_write(path) as tmp, tmp.open("w", encoding="utf-8", errors="surrogatepass") as target:
                target.writelines(f"{originals[line]}\n" for line, _ in file.lines if line in fresh)
        return {"path": str(path), "rows": len(file.lines), "known": known}


def has_data(path: Path) -> bool:
    """Return whether a path is a file, or a folder with a data file."""
    return path.is_file() or any(Path(file.name.removesuffix(".gz")).suffix in READERS for file in path.rglob("*"))


def hashed_rows(table: Path) -> Iterator[tuple[int, frozenset[int]]]:
    """Yield the line of every row of a raw table, and the hashes of its pairs; no hashes if it is invalid."""
    for (_, line), rows in groupby(read_rows(table), itemgetter("file", "line")):
        pairs = list(rows)
        yield line, frozenset(() if any(pair["rule"] for pair in pairs) else map(hash_texts, pairs))


def read_rows(table: Path) -> Iterator[dict[str, Any]]:
    """Yield file, line, texts and rule of every row of a raw table."""
    for batch in pq.ParquetFile(table).iter_batches(GROUP_ROWS, columns=["file", "line", *PAIR_TEXTS, "rule"]):
        yield from batch.to_pylist()


def hash_texts(pair: dict[str, Any]) -> int:
    """Return a hash of the normalized texts of a pair."""
    texts = json.dumps([normalize(pair[field]) for field in PAIR_TEXTS])
    return int.from_bytes(hashlib.sha256(texts.encode()).digest()[:8])


def limited(rows: Iterable[RawRow], mib: float) -> Iterator[RawRow]:
    """Yield rows up to a size of their texts, then raise InputError: a small file can unpack to any size."""
    size = 0
    for row in rows:
        size += len(row.original)
        if size > mib * 2**20:
            raise InputError(f"{row.file}: more than {mib:g} MiB; split the file, or raise run.landed_mib")
        yield row


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block after some seconds."""

    def stop(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Check the files of the request and write the result."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / REQUEST).read_text())
    tables = folder / "tables"
    shutil.rmtree(tables, ignore_errors=True)
    tables.mkdir()
    result = Checker(load_params(), tables).check({Path(path): name for path, name in request.items()})
    write_json(folder / RESULT, result)


if __name__ == "__main__":
    run(main)
