"""Labelled rows: layouts and labels, the raw table, their rules, and pairs of prompts with both labels."""

import json

import pyarrow.parquet as pq
import pytest

from dpo.common.errors import InputError
from dpo.data.formats import Spelling, convert, detect
from dpo.data.ingest import ONE_LABEL, is_labelled, read_file_summaries, write_raw_pairs
from dpo.data.labels import DESIRABLE, UNDESIRABLE
from dpo.data.readers import read_files
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA, Labelled, RawLabelled, validate_schema
from dpo.data.settings import DataSettings, ValidateSettings
from dpo.data.turns import RowError
from dpo.data.validate import validate

ASK, JOY = {"role": "user", "content": "Film 3?"}, {"role": "assistant", "content": "A joy."}


def side_of(row, **spelling):
    """(prompt, desirable, completion) of a row."""
    spelling = Spelling(**spelling)
    converted = convert(row, spelling, detect([row], "data.jsonl", spelling))
    assert converted.is_labelled
    (pair,) = converted.pairs
    good, bad = pair["chosen"], pair["rejected"]
    assert (good is None) != (bad is None)
    return pair["prompt"], good is not None, good or bad


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Film 3?", "completion": "A joy."},
        {"question": "Film 3?", "answer": "A joy."},
        {"prompt": [ASK], "completion": [JOY]},
        {"messages": [ASK, JOY]},
        {"conversations": [{"from": "human", "value": "Film 3?"}, {"from": "gpt", "value": "A joy."}]},
    ],
)
@pytest.mark.parametrize("name", ["label", "kto_tag", "thumbs", "feedback"])
@pytest.mark.parametrize(("value", "desirable"), [(True, True), (0, False), ("up", True), ("Thumbs down", False)])
def test_every_layout_is_read_with_its_label(row, name, value, desirable):
    assert side_of({**row, name: value}) == ("Film 3?", desirable, "A joy.")


@pytest.mark.parametrize(
    ("value", "desirable"),
    [*((word, True) for word in DESIRABLE), *((word, False) for word in UNDESIRABLE), (1.0, True), (-1, False)],
)
def test_all_spellings_of_a_label(value, desirable):
    for spelled in (value, value.upper() if isinstance(value, str) else value):
        assert side_of({"prompt": "Film 3?", "completion": "A joy.", "label": spelled})[1] is desirable


def test_the_label_is_that_of_what_follows_the_last_turn_of_the_user():
    more = {"role": "user", "content": "Why?"}
    row = {"messages": [ASK, JOY, more, {"role": "assistant", "content": "Its length."}], "label": False}
    assert side_of(row) == ("User: Film 3?\n\nAssistant: A joy.\n\nUser: Why?\n\nAssistant:", False, "Its length.")
    with pytest.raises(RowError, match="does not end with an assistant turn"):
        side_of({"messages": [ASK], "label": True})


@pytest.mark.parametrize(("rating", "desirable"), [(4, True), ("5", True), (3.9, False), (1, False), ("up", True)])
def test_a_rating_needs_the_smallest_number_that_is_desirable(rating, desirable):
    row = {"messages": [ASK, JOY], "rating": rating}
    assert side_of(row, min_desirable_rating=4.0)[1] is desirable
    if rating != "up":
        with pytest.raises(RowError, match=r"is the number .*; set data\.min_desirable_rating") as error:
            side_of(row)
        assert error.value.rule == "unknown_label"


@pytest.mark.parametrize("label", ["perhaps", 2, 0.5, [True]])
def test_another_label_is_named(label):
    with pytest.raises(RowError, match=r"field 'label' is .*, which is neither true nor false") as error:
        side_of({"prompt": "Film 3?", "completion": "A joy.", "label": label})
    assert error.value.rule == "unknown_label"


def rows_of(count, **fields):
    made = [
        {
            "prompt": f"Say something about film {n}.",
            "completion": f"Film {n} is a {word}.",
            "label": word == "joy",
        }
        for n in range(count)
        for word in ("joy", "bore")
    ]
    return [{**row, **fields, "split": "eval" if n < count else "train"} for n, row in enumerate(made)]


def raw(tmp_path, rows, **params):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(source="data/own/a.jsonl", **params)
    write_raw_pairs(read_files([str(tmp_path / "a.jsonl")]), tmp_path / "raw.parquet", "a.jsonl", settings)
    return tmp_path / "raw.parquet"


def checked(tmp_path, rows, **params):
    outputs = {name: tmp_path / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
    result = validate(
        raw(tmp_path, rows, **params), ValidateSettings(max_quarantined=1.0), tokenizer=None, max_length=200,
        benchmarks=tmp_path / "none", caps={"train": None, "eval": None}, seed=1, origin="a", previous=None,
        outputs=outputs,
    )  # fmt: skip
    return result, {name: pq.read_table(path) for name, path in outputs.items() if path.is_file()}


def test_labelled_rows_have_a_table_of_their_own(tmp_path):
    result, tables = checked(tmp_path, rows_of(20, weight=2.0, agreement=0.7))
    assert is_labelled(tmp_path / "raw.parquet")
    raw_table = pq.read_table(tmp_path / "raw.parquet")
    assert raw_table.schema.equals(RAW_PAIRS_SCHEMA)
    validate_schema(RawLabelled, raw_table.to_pandas(), "raw")
    assert tables["train"].schema.equals(PAIRS_SCHEMA)
    validate_schema(Labelled, tables["train"].to_pandas(), "train")
    assert result.metrics["kind"] == "labelled"
    assert result.metrics["labels"] == {"desirable": 20, "undesirable": 20}
    assert result.metrics["chosen_longer"] is None
    assert result.metrics["lengths"]["rejected"]["max"] == len("Film 10 is a bore.")
    assert tables["train"]["weight"].to_pylist() == [2.0] * 20
    assert tables["train"]["agreement"].null_count == 20
    assert read_file_summaries(tmp_path / "raw.parquet")[str(tmp_path / "a.jsonl")].unread == {"agreement": 40}
    assert not result.errors


def test_duplicates_and_contradictions_are_quarantined_with_the_reason(tmp_path):
    rows = rows_of(20)
    contradiction = {**rows[-1], "label": True}
    _, tables = checked(tmp_path, [*rows, rows[-2], contradiction])
    found = [(row["line"], row["rule"], row["reason"]) for row in tables["quarantine"].to_pylist()]
    assert found == [
        (40, "contradiction", "row 42 has the other label"),
        (41, "duplicate_pair", "the same pair as row 39"),
        (42, "contradiction", "row 40 has the other label"),
    ]


def test_a_prompt_in_both_splits_is_quarantined_and_few_prompts_leak_nothing(tmp_path):
    texts = (("Film 1?", "A joy.", "eval"), ("Film 2?", "A delight.", "train"), ("Film 1?", "Fun.", "train"))
    rows = [{"prompt": p, "completion": c, "label": True, "split": split} for p, c, split in texts]
    _, tables = checked(tmp_path, rows)
    assert [row["rule"] for row in tables["quarantine"].to_pylist()] == ["prompt_in_both_splits"]


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (20, 20, None),
        (40, 10, None),
        (50, 10, "10 rows are undesirable and 50 are not; set losses.kto.undesirable_weight from 3.75 to 5"),
        (10, 50, "10 rows are desirable and 50 are not; set losses.kto.desirable_weight from 5 to 6.67"),
        (20, 0, "no row is undesirable"),
    ],
)
def test_the_balance_of_the_labels_is_reported(tmp_path, good, bad, words):
    rows = rows_of(good + bad)
    used = [row for row in rows if row["label"]][:good] + [row for row in rows if not row["label"]][
        good : good + bad
    ]
    result, _ = checked(tmp_path, [{**row, "split": "train" if n % 2 else "eval"} for n, row in enumerate(used)])
    reasons = [reason for rule, reason in result.summary.notices if rule == "label_balance"]
    assert [words in reason for reason in reasons] == ([True] if words else [])


@pytest.mark.parametrize("first", [True, False])
def test_pairs_and_labelled_rows_in_one_run_are_refused(tmp_path, first):
    rows = [
        {"prompt": "Film 3?", "completion": "Joy", "label": True},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    with pytest.raises(
        InputError, match=r"a\.jsonl, line \d: a row of one completion with a label; .*trains on pairs"
    ):
        raw(tmp_path, rows if first else rows[::-1])


def test_prompts_with_both_labels_become_pairs(tmp_path):
    single = {"prompt": "What of a book?", "completion": "Good.", "label": True}
    result, tables = checked(tmp_path, [*rows_of(20), single], pair_labels=True)
    assert not is_labelled(tmp_path / "raw.parquet")
    assert result.metrics["kind"] == "pairs"
    assert [(row["chosen"], row["rejected"]) for row in tables["train"].to_pylist()] == [
        (f"Film {n} is a joy.", f"Film {n} is a bore.") for n in range(10, 20)
    ]
    assert read_file_summaries(tmp_path / "raw.parquet")[str(tmp_path / "a.jsonl")].notes == {ONE_LABEL: 1}
    assert len(tables["train"]["id"].unique()) == 10
    with pytest.raises(InputError, match=r"line 1: a pair, so data\.pair_labels has no effect"):
        raw(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], pair_labels=True)
