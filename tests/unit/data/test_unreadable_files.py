"""Lines and files that cannot be read, and their errors."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data import readers
from dpo.data.formats import Spelling, convert
from dpo.data.readers import read_files
from dpo.data.turns import RowError
from tasks.commands.validate import check_files
from tests.support.data_files import content_of, read, rows_of, texts, write

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("line", "rule", "reason"),
    [
        (b'{"prompt": "caf\xe9"}', "invalid_utf8", "byte 0xe9 at column 16 is not UTF-8"),
        (b"\xff\xff", "invalid_utf8", "byte 0xff at column 1"),
        (b'{"prompt":', "unreadable_row", "not JSON: Expecting value"),
        (b'{"a": 1} {"a": 2}', "unreadable_row", "not JSON: Extra data"),
        (b"prompt,chosen,rejected", "unreadable_row", "not JSON"),
        (b"\0\0", "unreadable_row", "not JSON"),
        (b"[" * 5000 + b"]" * 5000, "unreadable_row", "not JSON: maximum recursion depth"),
        (b"9" * 5000, "unreadable_row", "not JSON: Exceeds the limit"),
        (b'["a"]', "unreadable_row", "a JSON list, not an object"),
        (b'"a"', "unreadable_row", "a JSON str, not an object"),
        (b"null", "unreadable_row", "a JSON NoneType, not an object"),
        (b"NaN", "unreadable_row", "a JSON float, not an object"),
    ],
)
def test_an_unreadable_line_breaks_a_rule_and_keeps_its_text(tmp_path, line, rule, reason):
    good = content_of(texts(1), ".jsonl")
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    before, raw, after = read(tmp_path / "a.jsonl")
    assert before.row == after.row == texts(1)[0]
    assert (raw.line, raw.row) == (2, None)
    assert raw.violation[0] == rule
    assert reason in raw.violation[1]
    assert raw.original == line.decode(errors="backslashreplace")


def test_json_extensions_of_python_are_accepted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": NaN}\n{"a": 1e999}\n{"a": "\\ud83d"}\n')
    assert str(rows_of(tmp_path / "a.jsonl")) == "[{'a': nan}, {'a': inf}, {'a': '\\ud83d'}]"


@pytest.mark.parametrize("kind", [".json", ".csv"])
def test_invalid_utf8_in_json_and_csv_breaks_a_rule_for_that_row_only(tmp_path, kind):
    content = content_of(texts(), kind).replace(b"Film 1?", b"Film \xe9?")
    (tmp_path / f"a{kind}").write_bytes(content)
    before, raw, after = read(tmp_path / f"a{kind}")
    assert [before.row, after.row] == texts()[::2]
    assert raw.violation is None
    with pytest.raises(RowError, match="byte 0xe9 is not UTF-8") as error:
        convert(raw.row, Spelling(), "pairs")
    assert error.value.rule == "invalid_utf8"
    assert json.loads(raw.original)["prompt"] == "Film \udce9?"
    raw.original.encode()


def test_a_parquet_row_that_python_cannot_represent_breaks_a_rule(tmp_path):
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3))
    prompt = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    pq.write_table(pa.table({"prompt": prompt}), tmp_path / "text.parquet")
    time = pa.array([0, 2**60, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"timestamp": time}), tmp_path / "time.parquet")
    for name, rule in (("text", "invalid_utf8"), ("time", "unreadable_row")):
        raws = read(tmp_path / f"{name}.parquet")
        assert [raw.line for raw in raws] == [1, 2, 3]
        assert [raw.violation and raw.violation[0] for raw in raws] == [None, rule, None]
    assert [raw.original for raw in read(tmp_path / "text.parquet")] == [
        '{"prompt":"a"}',
        "\\xff",
        '{"prompt":"c"}',
    ]


def test_array_items_that_are_not_objects_break_a_rule(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, 3, ["b"], null, {"a": 2}]')
    raws = read(tmp_path / "a.json")
    assert [raw.violation for raw in raws] == [
        None,
        ("unreadable_row", "int, not an object"),
        ("unreadable_row", "list, not an object"),
        ("unreadable_row", "NoneType, not an object"),
        None,
    ]
    assert [raw.original for raw in raws] == ['{"a":1}', "3", '["b"]', "null", '{"a":2}']


def test_csv_records_of_the_wrong_length_break_a_rule_and_keep_all_fields(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\n\n ,b,c\n")
    raws = read(tmp_path / "a.csv")
    assert [raw.line for raw in raws] == [2, 3, 4, 6]
    assert [raw.violation and raw.violation[1] for raw in raws] == [
        None,
        "2 fields, the header has 3",
        "4 fields, the header has 3",
        None,
    ]
    assert [raw.original for raw in raws[1:3]] == ['["a","b"]', '["a","b","c","d"]']


@pytest.mark.parametrize("levels", [*range(200, 960, 200), *range(900, 1000, 3), 3000])
def test_json_of_any_depth_is_read_or_rejected(tmp_path, levels):
    (tmp_path / "a.json").write_text(f'[{{"prompt": {"[" * levels}{"]" * levels}}}]')
    try:
        (raw,) = read(tmp_path / "a.json")
    except InputError:
        assert levels > 900
    else:
        raw.original.encode()


def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path):
    name = str(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    Path(name).write_bytes(content_of(texts(1), ".jsonl"))
    (raw,) = read(name)
    assert raw.file == str(tmp_path / "caf\\udce9.jsonl")


def truncated(kind, keep):
    content = content_of(texts(400), kind)
    return content[: int(keep * len(content))]


def corrupted(kind, position):
    content = bytearray(content_of(texts(), kind))
    content[position] ^= 0xFF
    return bytes(content)


UNREADABLE = {
    "corrupt.jsonl.gz": (b"these bytes are not gzip", "not a complete, readable .jsonl file in gzip"),
    "header.csv.gz": (b"\x1f\x8b\x08\x00garbage and more of it", "not a complete, readable .csv file in gzip"),
    "cut.jsonl.gz": (truncated(".jsonl.gz", 0.6), "not a complete, readable .jsonl file in gzip"),
    "cut.json.gz": (truncated(".json.gz", 0.6), "not a complete, readable .json file in gzip"),
    "cut.csv.gz": (truncated(".csv.gz", 0.6), "not a complete, readable .csv file in gzip"),
    "cut.parquet.gz": (truncated(".parquet.gz", 0.6), "not a complete, readable .parquet file in gzip"),
    "cut.parquet": (truncated(".parquet", 0.6), "not a complete, readable .parquet file"),
    "head.parquet": (b"PAR1 but not really", "not a complete, readable .parquet file"),
    "garbage.parquet": (b"\0" * 100, "not a complete, readable .parquet file"),
    "thrift.parquet": (corrupted(".parquet", -8), "not a complete, readable .parquet file"),
    "field.parquet": (
        content_of(texts(), ".parquet").replace(b"chosen", b"cho\xffen"),
        "not a complete, readable",
    ),
    "empty.parquet": (b"", "not a complete, readable .parquet file"),
    "cut.json": (truncated(".json", 0.6), "not a complete JSON file"),
    "empty.json": (b"", "not a complete JSON file"),
    "deep.json": (b"[" * 100_000, "not a complete JSON file"),
    "text.json": (b'"text"', "a JSON str; save an array of objects"),
    "number.json": (b"3", "a JSON int; save an array of objects"),
    "semicolons.csv": (b"prompt;chosen;rejected\na;b;c\n", "the delimiter seems to be ';'; use commas"),
    "tabs.csv": (b"prompt\tchosen\trejected\na\tb, c\td\n", "the delimiter seems to be '\\t'"),
    "bars.csv": (b"prompt|chosen|rejected\na|b|c\n", "the delimiter seems to be '|'"),
    "one.csv": (b"prompt\na\n", "the header has no commas"),
    "empty.csv": (b"", "the header has no commas"),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", "the header has column 'chosen' twice"),
    "open.csv": (b'prompt,chosen\na,b\nc,"d\ne,f\n', "line 4: not CSV: unexpected end of data"),
    "quotes.csv": (b'prompt,chosen\na,"b \\"c\\" d"\n', "line 2: not CSV: ',' expected after '\"'"),
    "utf16.jsonl": ('{"a": 1}\n'.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "utf16.json": ('[{"a": 1}]'.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "utf16.csv": ("prompt,chosen\na,b\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "utf16.csv.gz": (gzip.compress("a,b\n".encode("utf-16")), "the file is UTF-16; save it as UTF-8"),
    "be.csv": (b"\xfe\xff" + "prompt,chosen\n".encode("utf-16-be"), "the file is UTF-16; save it as UTF-8"),
    "pairs.txt": (b"a", "unknown file type; use .jsonl, .json, .csv, .parquet"),
    "pairs.tar.gz": (b"a", "unknown file type"),
    "pairs": (b"a", "unknown file type"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_gives_one_line_with_name_and_reason(tmp_path, name):
    content, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_without_data_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").write_text("no data")
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file or folder"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match=r"empty: the folder contains no data; add files that end in \.jsonl"):
        read(tmp_path / "empty")


def test_rows_before_damage_in_a_file_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(truncated(".jsonl.gz", 0.6))
    rows = read_files([str(tmp_path / "a.jsonl.gz")])
    assert next(rows).row == texts(1)[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.jsonl", "line 2 is longer than"),
        ("a.jsonl.gz", "line 2 is longer than"),
        ("a.csv", "a line is longer than"),
        ("a.csv.gz", "a line is longer than"),
    ],
)
def test_a_line_above_the_size_limit_is_rejected(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    kind = "".join(Path(name).suffixes)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write(tmp_path / name, [row | {"prompt": "x" * 50}])
    assert len(rows_of(tmp_path / name)) == 1
    row = row | {"prompt": "x" * 100} if "jsonl" in name else dict.fromkeys(map(str, range(60)), "x")
    content = content_of([{"prompt": "a"}, row] if "jsonl" in name else [row], kind)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read(tmp_path / name)


def test_a_csv_cell_above_the_size_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    write(tmp_path / "a.csv", [{"prompt": "x\n" * 60, "chosen": "b"}])
    with pytest.raises(InputError, match="not CSV: field larger than field limit"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(("name", "words"), [("a.jsonl", "line 1 is longer"), ("a.csv", "a line is longer")])
def test_a_file_of_200_mb_in_one_line_is_rejected(tmp_path, name, words):
    with (tmp_path / name).open("wb") as file:
        for _ in range(200):
            file.write(b"a," * 2**19)
    with pytest.raises(InputError, match=f"{words} than 64 MiB"):
        read(tmp_path / name)
    (tmp_path / name).unlink()


def test_a_json_array_above_the_size_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LOADED_BYTES", 1000)
    for kind in (".json", ".json.gz"):
        name = write(tmp_path / f"a{kind}", texts(100))
        with pytest.raises(InputError, match="a JSON array of more than 0 MiB; save it as JSONL"):
            read(name)
    (tmp_path / "lines.json").write_bytes(content_of(texts(100), ".jsonl"))
    assert len(rows_of(tmp_path / "lines.json")) == 100


def test_compressed_parquet_above_the_size_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LOADED_BYTES", 1000)
    name = write(tmp_path / "a.parquet.gz", texts(100))
    with pytest.raises(InputError, match="Parquet in gzip of more than 0 MiB; unpack it"):
        read(name)


@pytest.mark.parametrize("name", ["cut.parquet", "semicolons.csv", "cut.jsonl.gz", "empty", "rows.jsonl"])
def test_check_files_writes_only_the_error_of_an_unreadable_file(own, name):
    if name == "empty":
        Path(name).mkdir()
    else:
        Path(name).write_bytes(UNREADABLE[name][0] if name in UNREADABLE else b"\n \n")
    with pytest.raises(InputError) as error:
        check_files(load_params(ROOT / "params.yaml"), [name], None, Path("checked"))
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)
    assert list(Path("checked").iterdir()) == [Path("checked/metrics.json")]
    written = json.loads(Path("checked/metrics.json").read_text())
    assert written == {"errors": [{"code": "unreadable", "message": str(error.value)}]}


@pytest.mark.parametrize("name", ["corrupt.jsonl.gz", "missing.jsonl"])
def test_the_command_ends_with_one_line_and_no_traceback(tmp_path, name):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    if name in UNREADABLE:
        (tmp_path / name).write_bytes(UNREADABLE[name][0])
    done = subprocess.run(
        [sys.executable, "-m", "tasks.commands.cli", "validate", name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert name in line
    assert "Traceback" not in done.stderr
