"""Readers of files and folders."""

import pytest

from dpo.data.formats import Spelling, convert, detect
from dpo.data.sources import read_source
from tests.support.data_files import FORMS, content_of, data_params, read, rows_of, texts, write

KINDS = [f"{kind}{gz}" for kind in (".jsonl", ".json", ".csv", ".parquet") for gz in ("", ".gz")]


def lines_of(*names):
    return [raw.line for raw in read(*names)]


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
