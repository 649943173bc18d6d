"""Readers of files, folders, saved data sets and the hub, and their errors."""

import csv
import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from dpo.common.errors import InputError, TransientError
from dpo.config import load_params
from dpo.data import readers
from dpo.data.formats import Spelling, convert, detect
from dpo.data.readers import read_files
from dpo.data.settings import DataSettings
from dpo.data.sources import read_source
from dpo.data.turns import RowError
from tasks.commands.validate import check_files

ROOT = Path(__file__).parents[3]
KINDS = [f"{kind}{gz}" for kind in (".jsonl", ".json", ".csv", ".parquet") for gz in ("", ".gz")]


def data_params(**changes):
    defaults = {
        "source": "data/own/pairs.jsonl",
        "revision": None,
        "pairing": "best_worst",
        "max_train_pairs": None,
        "max_eval_pairs": None,
        "eval_fraction": 0.25,
        "min_rating_gap": 1.0,
    }
    return DataSettings(**{**defaults, **changes})


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/own").mkdir(parents=True)
    return tmp_path / "data/own"


def texts(count=3, start=0):
    return [
        {"prompt": f"Film {i}?", "chosen": f"A joy, “{i}”;\n{i}.", "rejected": f"Bore {i}"}
        for i in range(start, start + count)
    ]


def content_of(rows, kind):
    if kind.endswith(".gz"):
        return gzip.compress(content_of(rows, kind.removesuffix(".gz")))
    if kind == ".jsonl":
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if kind == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content_of(rows, "".join(path.suffixes)))
    return str(path)


def read(*names):
    return list(read_files(map(str, names)))


def rows_of(*names):
    raws = read(*names)
    assert not any(raw.violation for raw in raws)
    return [raw.row for raw in raws]


def lines_of(*names):
    return [raw.line for raw in read(*names)]


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


TURNS = [{"role": "system", "content": "Be brief."}, user("Film 3?"), answer("A joy."), user("Why, “so”?")]
FORMS = {
    "texts": texts(),
    "texts with all columns": [
        {
            **row,
            "id": str(i),
            "split": "test",
            "source": "forum",
            "timestamp": "2024-05-01",
            "weight": 0.5,
            "agreement": 0.75,
            "chosen_rating": 2.0,
            "rejected_rating": -1.0,
        }
        for i, row in enumerate(texts())
    ],
    "instruction": [{"instruction": "a", "chosen": "b", "rejected": "c"}],
    "conversational": [{"prompt": TURNS, "chosen": [answer("b")], "rejected": [answer("c")]}] * 2,
    "ultrafeedback binarized": [
        {"prompt": "a", "chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]}
    ],
    "implicit prompt": [{"chosen": [*TURNS, answer("b")], "rejected": [*TURNS, answer("c")]}] * 2,
    "transcripts": [
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        }
    ],
    "ultrafeedback": [
        {
            "instruction": "a",
            "completions": [{"response": "b", "overall_score": 1.5}, {"response": "c", "overall_score": 3.0}],
        }
    ],
    "scores": [{"prompt": "a", "responses": ["b", "c", "d"], "scores": [1.5, 3.0, 0.0]}],
    "ranks": [{"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 3]}],
}


def pairs_of(rows):
    layout = detect(rows, "x", Spelling())
    return [pair for row in rows for pair in convert(row, Spelling(pairing="best_rest"), layout).pairs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_format_is_read_from_every_file_type(tmp_path, form, kind):
    rows = rows_of(write(tmp_path / f"pairs{kind}", FORMS[form]))
    assert pairs_of(rows) == pairs_of(FORMS[form])
    if "csv" not in kind:
        assert rows == FORMS[form]


@pytest.mark.parametrize("text", ["[sic] a film", "[1, 2]", "[", "[]", '["a"]', '{"role": "user"}', "3", "null"])
def test_other_json_in_csv_stays_text(tmp_path, text):
    row = {"prompt": text, "chosen": text, "rejected": "c"}
    assert rows_of(write(tmp_path / "a.csv", [row])) == [row]


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_a_json_file_can_contain_json_lines(tmp_path, gz):
    content = content_of(texts(), f".jsonl{gz}")
    (tmp_path / f"a.json{gz}").write_bytes(content)
    assert rows_of(tmp_path / f"a.json{gz}") == texts()
    assert lines_of(tmp_path / f"a.json{gz}") == [1, 2, 3]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_skipped(tmp_path, kind):
    (tmp_path / f"a{kind}").write_bytes(b"\xef\xbb\xbf" + content_of(texts(), kind))
    assert rows_of(tmp_path / f"a{kind}") == texts()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_windows_line_ends_are_accepted(tmp_path, kind):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    content = content_of(rows, kind).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (tmp_path / f"a{kind}").write_bytes(content)
    assert rows_of(tmp_path / f"a{kind}") == rows


def test_the_last_line_needs_no_line_end(tmp_path):
    for kind in (".jsonl", ".csv"):
        (tmp_path / f"a{kind}").write_bytes(content_of(texts(), kind).rstrip())
        assert rows_of(tmp_path / f"a{kind}") == texts()


def test_blank_lines_are_counted_but_give_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": 1}\n \t\r\n\n{"a": 2}\n{broken\n\n{"a": 3}')
    assert lines_of(path) == [2, 5, 6, 8]
    assert [raw.row for raw in read(path)] == [{"a": 1}, {"a": 2}, None, {"a": 3}]
    assert {raw.file for raw in read(path)} == {str(path)}


def test_a_multiline_csv_record_has_the_number_of_its_last_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,chosen\n"a\nb\n\nc",d\n\ne,"f ""g""\r\nh"\ni,j\n')
    assert rows_of(path) == [
        {"prompt": "a\nb\n\nc", "chosen": "d"},
        {"prompt": "e", "chosen": 'f "g"\r\nh'},
        {"prompt": "i", "chosen": "j"},
    ]
    assert lines_of(path) == [5, 8, 9]


@pytest.mark.parametrize("kind", [".parquet", ".parquet.gz", ".json"])
def test_rows_of_parquet_and_json_arrays_are_numbered_from_1(tmp_path, kind):
    write(tmp_path / f"a{kind}", texts(2500))
    assert lines_of(tmp_path / f"a{kind}") == list(range(1, 2501))


def test_files_of_a_folder_are_read_in_the_order_of_names(tmp_path):
    for number, name in enumerate(("b.jsonl", "a.json.gz", "c/d/e.csv", "c/a.parquet")):
        write(tmp_path / "own" / name, texts(2, 10 * number))
    (tmp_path / "own/readme.md").write_text("no data")
    raws = read(tmp_path / "own")
    order = ["a.json.gz", "b.jsonl", "c/a.parquet", "c/d/e.csv"]
    assert [raw.file for raw in raws] == [str(tmp_path / "own" / name) for name in order for _ in range(2)]
    assert [raw.row["prompt"] for raw in raws[::2]] == ["Film 10?", "Film 0?", "Film 30?", "Film 20?"]
    assert not any("split" in raw.row for raw in raws)


def test_several_sources_are_read_in_order(own):
    names = [write(own / "b.jsonl", texts(2)), write(own / "folder/a.csv", texts(2, 2))]
    rows = read_source(data_params(source=(names[0], str(own / "folder"))), 1)
    assert [raw.row for raw in rows] == texts(4)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("train_prefs.csv", "test_prefs.csv.gz"),
        ("pairs.json", "dev.json"),
        ("sub/Train.jsonl", "sub/Eval 2.jsonl"),
    ],
)
def test_files_named_after_splits_set_the_split(tmp_path, train, held_out):
    write(tmp_path / "own" / train, texts(2))
    write(tmp_path / "own" / held_out, texts(3, 2))
    assert sorted(row["split"] for row in rows_of(tmp_path / "own")) == ["eval"] * 3 + ["train"] * 2
    assert all("split" not in raw.original for raw in read(tmp_path / "own"))


@pytest.mark.parametrize("names", [["train.jsonl"], ["train-1.jsonl", "train-2.jsonl"], ["attest.csv", "a.csv"]])
def test_folders_without_an_eval_file_set_no_split(tmp_path, names):
    for name in names:
        write(tmp_path / "own" / name, texts(2))
    assert not any("split" in row for row in rows_of(tmp_path / "own"))


def test_a_split_column_has_priority_over_the_file_name(tmp_path):
    rows = [{**row, "split": split} for row, split in zip(texts(3), ("train", None, ""), strict=True)]
    write(tmp_path / "own/test.jsonl", rows)
    write(tmp_path / "own/train.jsonl", texts(1, 3))
    assert [row["split"] for row in rows_of(tmp_path / "own")] == ["train", "eval", "eval", "train"]


def test_files_named_after_splits_share_the_folder_as_source(tmp_path):
    write(tmp_path / "own/test.jsonl", texts(1))
    write(tmp_path / "own/train.jsonl", [*texts(1, 1), {**texts(1, 2)[0], "source": "lab"}])
    assert [row["source"] for row in rows_of(tmp_path / "own")] == ["own", "own", "lab"]


@pytest.mark.parametrize("held_out", ["test", "validation", "test_prefs"])
def test_a_saved_data_set_keeps_its_splits(tmp_path, held_out):
    data = DatasetDict({"train": Dataset.from_list(texts(3)), held_out: Dataset.from_list(texts(2, 3))})
    data.save_to_disk(str(tmp_path / "saved"))
    raws, source = read(tmp_path / "saved"), str(tmp_path / "saved")
    assert [raw.row for raw in raws] == [
        *({**row, "split": "train", "source": source} for row in texts(3)),
        *({**row, "split": "eval", "source": source} for row in texts(2, 3)),
    ]
    assert [raw.file for raw in raws] == [
        *[f"{tmp_path / 'saved'}:train"] * 3,
        *[f"{tmp_path / 'saved'}:{held_out}"] * 2,
    ]
    assert [raw.line for raw in raws] == [1, 2, 3, 1, 2]


def test_a_saved_data_set_without_splits_sets_no_split(tmp_path):
    Dataset.from_list(FORMS["implicit prompt"]).save_to_disk(str(tmp_path / "saved"))
    assert rows_of(tmp_path / "saved") == FORMS["implicit prompt"]
    DatasetDict({"train": Dataset.from_list(texts(2))}).save_to_disk(str(tmp_path / "single"))
    assert rows_of(tmp_path / "single") == texts(2)


def truncate_arrow(folder):
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize(
    "damage",
    [
        truncate_arrow,
        lambda folder: next(folder.glob("*.arrow")).unlink(),
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: (folder / "dataset_info.json").write_text('{"features": {"a": 3}}'),
        lambda folder: (folder / "state.json").write_text("{}"),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text("{"),
    ],
)
def test_an_incomplete_saved_data_set_is_rejected(tmp_path, damage):
    Dataset.from_list(texts()).save_to_disk(str(tmp_path / "saved"))
    damage(tmp_path / "saved")
    with pytest.raises(InputError, match="saved: not a complete saved data set"):
        read(tmp_path / "saved")


def test_a_hub_data_set_is_loaded_at_its_revision_with_its_splits(own, monkeypatch):
    calls = []

    def load_dataset(name, config, revision):
        calls.append((name, revision))
        return DatasetDict({"train": Dataset.from_list(texts(6)), "test": Dataset.from_list(texts(3, 6))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raws = list(read_source(data_params(source="someone/pairs", revision="abc"), 1))
    assert calls == [("someone/pairs", "abc")]
    assert [raw.row["split"] for raw in raws] == ["train"] * 6 + ["eval"] * 3
    assert [raw.row["prompt"] for raw in raws] == [row["prompt"] for row in texts(9)]
    assert (raws[6].file, raws[6].line) == ("someone/pairs:test", 1)


def test_a_hub_data_set_without_eval_data_sets_no_split(own, monkeypatch):
    loaded = DatasetDict({"train_prefs": Dataset.from_list(texts(2)), "train_sft": Dataset.from_list(texts(2, 2))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, revision: loaded)
    rows = [raw.row for raw in read_source(data_params(source="someone/pairs", revision="abc"), 1)]
    assert rows == texts(4)


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("gone"), OSError("gone"), ValueError("gone")]
)
def test_a_hub_data_set_that_cannot_be_loaded_raises_input_error(own, monkeypatch, error):
    def load_dataset(name, config, revision):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="cannot load 'a/b' at 'main': gone"):
        read_source(data_params(source="a/b", revision="main"), 1)


class HttpError(OSError):
    """An error with the response of a server, as huggingface_hub raises it."""

    def __init__(self, status):
        super().__init__("gone")
        self.response = SimpleNamespace(status_code=status)


TransportError = type("TransportError", (Exception,), {})


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("gone"), TransientError),
        (TimeoutError("gone"), TransientError),
        (TransportError("gone"), TransientError),
        (HttpError(429), TransientError),
        (HttpError(503), TransientError),
        (caused_by(ValueError("gone"), HttpError(500)), TransientError),
        (caused_by(ValueError("gone"), ConnectionError("reset")), TransientError),
        (HttpError(404), InputError),
        (caused_by(datasets.exceptions.DatasetNotFoundError("gone"), HttpError(401)), InputError),
    ],
)
def test_connection_errors_of_the_hub_are_transient(own, monkeypatch, error, kind):
    def load_dataset(name, config, revision):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match="cannot load 'a/b' at 'main': gone"):
        read_source(data_params(source="a/b", revision="main"), 1)


def test_a_connection_error_in_offline_mode_is_not_transient(own, monkeypatch):
    def load_dataset(name, config, revision):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="cannot load 'a/b' at 'main': offline mode is enabled"):
        read_source(data_params(source="a/b", revision="main"), 1)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"source": "data/own/missing.csv"}, ["data/own/missing.csv: no such file or folder"]),
        ({"source": "../pairs.csv"}, ["../pairs.csv is outside data/own/", "copy it to data/own/pairs.csv"]),
        ({"source": "data/own/../../secret.csv"}, ["is outside data/own/", "copy it to data/own/secret.csv"]),
        ({"source": "/tmp/pairs.jsonl"}, ["/tmp/pairs.jsonl is outside data/own/"]),
        ({"source": "data"}, ["data is outside data/own/"]),
        ({"source": ("data/own/a.csv", "secret.csv")}, ["secret.csv is outside data/own/"]),
        ({"source": "someone/pairs"}, ["'someone/pairs' is not `default`", "a file or a folder", "data.revision"]),
        ({"source": ("someone/pairs",)}, ["'someone/pairs' is not `default`", "data.revision"]),
        ({"source": ("a/b", "data/own/a.csv")}, ["texts of a list may contain files and folders only"]),
        ({"source": ("default", "data/own/a.csv")}, ["texts of a list may contain files and folders only"]),
        ({"source": "default", "revision": "main"}, ["data.revision has no effect"]),
        ({"source": ("default",), "revision": "main"}, ["data.revision has no effect"]),
        ({"source": "data/own/a.csv", "revision": "main"}, ["data.revision has no effect"]),
        ({"source": ("data/own/a.csv", "a/b"), "revision": "main"}, ["data.revision has no effect"]),
    ],
)
def test_an_invalid_source_is_rejected_with_the_fix(own, params, words):
    write(own / "a.csv", texts())
    write(own.parent.parent / "secret.csv", texts())
    with pytest.raises(InputError) as error:
        list(read_source(data_params(**params), 1))
    assert all(word in str(error.value) for word in words), error.value


def test_the_data_folder_can_be_a_symbolic_link(own, tmp_path):
    write(tmp_path / "other/a.jsonl", texts())
    shutil.rmtree(own)
    own.symlink_to(tmp_path / "other")
    for name in ("data/own/a.jsonl", "data/own", str(own / "a.jsonl")):
        assert [raw.row for raw in read_source(data_params(source=name), 1)] == texts()


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
