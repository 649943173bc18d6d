"""The raw table contains every row of a source, as pairs or with the rule that it breaks."""

import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.data import ingest
from dpo.data.formats import REPEATED_PROMPT
from dpo.data.ingest import read_file_summaries, write_raw_pairs
from dpo.data.readers import BOM, RawRow, read_files
from dpo.data.schema import RAW_PAIRS_SCHEMA, RawPairs, validate_schema
from dpo.engine.chat import read_turns
from tests.support import data_files
from tests.support.examples import examples


def data_params(**changes):
    return data_files.data_params(**{"pairing": "best_rest"} | changes)


def texts(count, **fields):
    return [
        {"prompt": f"Film {i}?", "chosen": f"Joy {i}", "rejected": f"Bore {i}", **fields} for i in range(count)
    ]


def write(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([*lines, b""]))
    return path


def table_of(path, **params):
    target = path.with_name("ingest.parquet")
    write_raw_pairs(read_files([str(path)]), target, path.name, data_params(**params))
    table = pq.read_table(target)
    assert table.schema.equals(RAW_PAIRS_SCHEMA)
    validate_schema(RawPairs, table.to_pandas(), path.name)
    return table.to_pylist()


def splits(rows):
    return [row["split"] for row in rows]


MIXED = [
    {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3], "id": "p7", "weight": 2},
    {"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]},
    b"{broken",
    b"",
    {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2], "split": "holdout"},
    b'{"prompt": "caf\xe9"}',
    {"question": "a"},
    {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "responses": ["\ud83d", "c"],
        "ranks": [2, 1],
    },
]


def test_every_row_is_written_as_pairs_or_with_the_rule_that_it_breaks(tmp_path):
    path = write(tmp_path / "mixed.jsonl", MIXED)
    rows = table_of(path)
    assert [(row["line"], row["id"], row["rule"]) for row in rows] == [
        (1, "p7/0", None),
        (1, "p7/1", None),
        (2, None, "no_preference"),
        (3, None, "unreadable_row"),
        (5, None, "unknown_split"),
        (6, None, "invalid_utf8"),
        (7, None, "missing_text"),
        (8, None, "lone_surrogate"),
    ]
    lines = path.read_bytes().decode(errors="backslashreplace").split("\n")
    assert all(row["original"] == lines[row["line"] - 1] and row["file"] == str(path) for row in rows)
    assert all(bool(row["rule"]) == bool(row["reason"]) == (row["prompt"] is None) for row in rows)
    assert {row["source"] for row in rows if not row["rule"]} == {"mixed.jsonl"}
    assert rows[0]["chosen_rating"] == 3.0
    assert rows[0]["weight"] == 2.0


def test_a_summary_of_each_file_is_returned_and_stored(tmp_path):
    first = write(tmp_path / "a.jsonl", [{**row, "note": "x", "empty": ""} for row in texts(2)])
    repeated = {"prompt": "Film?", "chosen": "Film? A joy.", "rejected": "Film? A bore."}
    second = write(tmp_path / "b.jsonl", [repeated, {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}, {}])
    target = tmp_path / "table.parquet"
    files = write_raw_pairs(read_files([str(first), str(second)]), target, "both", data_params())
    assert read_file_summaries(target) == files
    one, other = files[str(first)], files[str(second)]
    assert (one.rows, dict(one.layouts), dict(one.unread), dict(one.notes)) == (2, {"pairs": 2}, {"note": 2}, {})
    assert (other.rows, dict(other.layouts)) == (3, {"pairs": 1, "rated completions": 1})
    assert dict(other.notes) == {REPEATED_PROMPT: 1}


def test_the_pairing_setting_is_used(tmp_path):
    path = write(tmp_path / "a.jsonl", MIXED[:1])
    assert [row["id"] for row in table_of(path, pairing="best_worst")] == ["p7"]


def test_turns_are_written(tmp_path):
    turns = MIXED[-1]["prompt"]
    (row,) = table_of(write(tmp_path / "a.jsonl", [{"prompt": turns, "chosen": "d", "rejected": "e"}]))
    assert read_turns(row["turns"]) == turns
    assert row["prompt"] == "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"


def test_added_rows_do_not_move_old_rows_to_the_other_split(tmp_path):
    few = splits(table_of(write(tmp_path / "few.jsonl", texts(40))))
    many = splits(table_of(write(tmp_path / "many.jsonl", [*texts(400)[::-1], *texts(40)])))
    assert many[-40:] == few
    assert many[:400][::-1][:40] == few


def test_variants_of_a_prompt_are_in_the_same_split(tmp_path):
    rows = [
        {**row, "prompt": prompt}
        for row in texts(50)
        for prompt in (row["prompt"], f"  {row['prompt'].upper()} ", row["prompt"].replace("F", "\uff26"))
    ]
    found = splits(table_of(write(tmp_path / "a.jsonl", rows)))
    assert found[::3] == found[1::3] == found[2::3]
    assert set(found) == {"train", "eval"}


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5])
def test_the_eval_share_is_close_to_eval_fraction(tmp_path, fraction):
    found = splits(table_of(write(tmp_path / "a.jsonl", texts(4000)), eval_fraction=fraction))
    assert found.count("eval") / 4000 == pytest.approx(fraction, abs=0.025)


@pytest.mark.parametrize("alias", ["eval", "test", "validation", "valid", "dev"])
def test_a_split_column_is_kept(tmp_path, alias):
    rows = [{**row, "split": "train" if i % 3 else alias} for i, row in enumerate(texts(60))]
    found = splits(table_of(write(tmp_path / "a.jsonl", rows)))
    assert found == ["train" if i % 3 else "eval" for i in range(60)]


def test_the_source_defaults_to_the_file_name(tmp_path):
    (tmp_path / "own/deep").mkdir(parents=True)
    write(tmp_path / "own/deep/a.jsonl", texts(1))
    write(tmp_path / "own/b.jsonl", [*texts(1, source="forum"), *texts(1, source=""), *texts(1, source=None)])
    rows = table_of(tmp_path / "own")
    assert [row["source"] for row in rows] == ["forum", "b.jsonl", "b.jsonl", "a.jsonl"]


def test_a_file_name_that_is_not_utf8_is_escaped_in_the_source(tmp_path):
    (row,) = table_of(write(tmp_path / "caf\udce9.jsonl", texts(1)))
    assert row["source"] == "caf\\udce9.jsonl"


def test_all_row_groups_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "GROUP_ROWS", 7)
    monkeypatch.setattr(ingest, "DETECT_ROWS", 5)
    rows = table_of(write(tmp_path / "a.jsonl", [*texts(24), b"broken", *texts(25)]))
    assert [row["line"] for row in rows] == list(range(1, 51))
    assert [row["rule"] for row in rows if row["rule"]] == ["unreadable_row"]
    file = pq.ParquetFile(tmp_path / "ingest.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [7] * 7 + [1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a.jsonl: no rows"),
        (b"\n  \n\r\n", "a.jsonl: no rows"),
        (BOM, "a.jsonl: no rows"),
        (b"\nbroken\n[]\n", "a.jsonl: line 2: not JSON: .*; none of the first 2 rows is readable"),
        (b"[]\n3\n", "a.jsonl: line 1: a JSON list, not an object; none of the first 2 rows is readable"),
        (b'{"a": 1}\n', "a.jsonl: unknown layout"),
    ],
)
def test_a_source_without_usable_rows_is_rejected(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        table_of(path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("after", [3, 2500, 9000])
@pytest.mark.parametrize("error", [InputError("a.jsonl: unreadable"), RuntimeError("out of order")])
def test_a_failing_reader_leaves_no_files(tmp_path, after, error):
    def rows():
        for number, row in enumerate(texts(after), 1):
            yield RawRow("a.jsonl", number, row, json.dumps(row))
        raise error

    with pytest.raises(type(error), match=str(error)):
        write_raw_pairs(rows(), tmp_path / "out/table.parquet", "a.jsonl", data_params())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failing_reader_keeps_the_old_table(tmp_path):
    target = write(tmp_path / "table.parquet", [b"old"])
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\na,b,c\n"d,e,f\n')
    with pytest.raises(InputError, match=r"a\.csv: line 3: not CSV"):
        write_raw_pairs(read_files([str(tmp_path / "a.csv")]), target, "a.csv", data_params())
    assert target.read_bytes() == b"old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "table.parquet"]


GOOD = json.dumps(texts(1)[0]).encode()
pieces = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [b"\n", b"\r\n", b" ", BOM, GOOD, GOOD[:-1], GOOD.replace(b"J", b"\xff"), b"{}", b"[]", b"\0"]
    ),
    st.sampled_from(
        [GOOD.replace(b"Joy", b"\\ud83d"), GOOD.replace(b'"Joy 0"', b"NaN"), b'{"chosen":1}', b"\x0b"]
    ),
)


@examples(200)
@given(st.lists(pieces, max_size=12).map(b"".join), st.booleans())
@example(b"\xff\xfe", False)
@example(b"\xfe\xffa", True)
@example(GOOD + b"\n" + b"[" * 100_000, False)
@example(GOOD + b"\n" + b'{"prompt":' * 1020 + b"1" + b"}" * 1020, False)
def test_any_bytes_give_a_row_per_line_or_an_input_error(content, valid):
    content += (b"\n" + GOOD) * valid
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        try:
            rows = table_of(path)
        except InputError as error:
            assert not valid or "UTF-16" in str(error)  # noqa: PT017
            assert list(Path(folder).iterdir()) == [path]
        else:
            lines = [line.strip() for line in content.removeprefix(BOM).split(b"\n")]
            assert [row["line"] for row in rows] == [i for i, line in enumerate(lines, 1) if line]
            assert all(row["rule"] or row["chosen"] for row in rows)
