"""Schemas of the tables: valid tables pass, violations are named."""

import os
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pytest
from pandera.config import ValidationDepth, config_context

from dpo.common.errors import InputError
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA, Pairs, RawPairs, validate_schema

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Film 3?"}]


def pair(**changes):
    row = {
        "id": "p1",
        "prompt": "Film 3?",
        "turns": None,
        "chosen": "A joy.",
        "rejected": "A bore.",
        "split": "train",
        "source": "film",
        "weight": 2.0,
        "agreement": 0.75,
        "chosen_rating": 3.0,
        "rejected_rating": -1.0,
    }
    return {**row, **changes}


def raw_pair(**changes):
    origin = {"file": "a.jsonl", "line": 1, "original": "{}", "rule": None, "reason": None}
    return pair(**{**origin, **changes})


def rejected_row(**changes):
    return raw_pair(**{**dict.fromkeys(pair()), "rule": "wrong_type", "reason": "a number", **changes})


def pairs_table(*rows):
    return pa.Table.from_pylist(list(rows), PAIRS_SCHEMA).to_pandas()


def raw_table(*rows):
    return pa.Table.from_pylist(list(rows), RAW_PAIRS_SCHEMA).to_pandas()


def schema_error(model, table):
    with pytest.raises(InputError) as error:
        validate_schema(model, table, "data/x.parquet")
    message = str(error.value)
    assert message.startswith("data/x.parquet: ")
    assert f"`{model.__name__}`" in message
    return message


def test_pandera_models_have_the_fields_of_the_arrow_schemas():
    assert list(Pairs.to_schema().columns) == PAIRS_SCHEMA.names
    assert list(RawPairs.to_schema().columns) == RAW_PAIRS_SCHEMA.names
    assert RAW_PAIRS_SCHEMA.names[: len(PAIRS_SCHEMA)] == PAIRS_SCHEMA.names


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"turns": TURNS},
        {"chosen": " A joy.", "rejected": "\n\nA bore."},
        {"prompt": ""},
        {"chosen": "日本語 🎬\u2028", "rejected": "."},
        {"split": "eval", "agreement": 0.0},
        {"agreement": 1.0, "weight": 1e-9},
        dict.fromkeys(("weight", "agreement", "chosen_rating", "rejected_rating")),
    ],
)
def test_valid_pairs_satisfy_both_schemas(changes):
    table = pairs_table(pair(**changes), pair(id="p2"))
    pd.testing.assert_frame_equal(validate_schema(Pairs, table, "x"), table)
    validate_schema(RawPairs, raw_table(raw_pair(**changes), raw_pair(**changes)), "x")


def test_empty_tables_satisfy_both_schemas():
    validate_schema(Pairs, pairs_table(), "x")
    validate_schema(RawPairs, raw_table(), "x")


BOTH = {
    "isin": {"split": "test"},
    "greater_than(0)": {"weight": 0.0},
    "less_than_or_equal_to(1)": {"agreement": 1.5},
    "greater_than_or_equal_to(0)": {"agreement": -0.1},
}
PAIRS_ONLY = {
    "not_nullable": [{field: None} for field in ("id", "prompt", "chosen", "rejected", "split", "source")],
    "str_contains": [{"chosen": ""}, {"rejected": " \n\t"}, {"chosen": "\u3000\xa0"}],
    "chosen and rejected differ": [{"chosen": "A bore."}, {"chosen": " A bore.\n"}],
}


@pytest.mark.parametrize(("rule", "changes"), BOTH.items())
def test_violations_of_both_schemas_are_rejected_by_both(rule, changes):
    (field,) = changes
    for model, table in (
        (Pairs, pairs_table(pair(), pair(id="p2", **changes))),
        (RawPairs, raw_table(raw_pair(), raw_pair(**changes))),
    ):
        message = schema_error(model, table)
        assert "1 violations" in message
        assert f"row 2, field '{field}': {rule}" in message


@pytest.mark.parametrize(("rule", "changes"), [(rule, row) for rule, rows in PAIRS_ONLY.items() for row in rows])
def test_violations_of_pairs_are_accepted_in_the_raw_table(rule, changes):
    message = schema_error(Pairs, pairs_table(pair(), pair(**{"id": "p2", **changes})))
    assert "row 2" in message
    assert rule in message
    validate_schema(RawPairs, raw_table(raw_pair(), rejected_row(**changes)), "x")


def test_ids_must_be_unique_in_pairs_only():
    assert "field 'id': field_uniqueness" in schema_error(Pairs, pairs_table(pair(), pair()))
    validate_schema(RawPairs, raw_table(raw_pair(), raw_pair()), "x")


@pytest.mark.parametrize("field", ["file", "line", "original"])
def test_raw_pairs_need_file_line_and_original(field):
    table = raw_table(raw_pair(), raw_pair(**{field: None}))
    assert f"field '{field}'" in schema_error(RawPairs, table)


@pytest.mark.parametrize("field", ["id", "prompt", "chosen", "rejected", "split", "source"])
def test_a_raw_pair_is_complete_or_has_the_rule_that_it_breaks(field):
    assert "row 1, field" in (message := schema_error(RawPairs, raw_table(raw_pair(**{field: None}), raw_pair())))
    assert "a pair, or a rule that it breaks" in message
    validate_schema(RawPairs, raw_table(rejected_row(), rejected_row()), "x")
    schema_error(RawPairs, raw_table(rejected_row(reason=None)))


@pytest.mark.parametrize(
    ("model", "make", "row"), [(Pairs, pairs_table, pair()), (RawPairs, raw_table, raw_pair())]
)
def test_unknown_and_missing_columns_are_rejected(model, make, row):
    assert "'surprise'" in schema_error(model, make(row).assign(surprise=1))
    for field in row:
        assert f"'{field}'" in schema_error(model, make(row).drop(columns=field))


@pytest.mark.parametrize(
    ("field", "value"), [("id", 7), ("prompt", 1.5), ("weight", "much"), ("agreement", 1), ("source", True)]
)
def test_values_are_not_converted(field, value):
    assert f"field '{field}': dtype" in schema_error(Pairs, pairs_table(pair()).assign(**{field: value}))


def test_ten_violations_are_shown_and_all_are_counted():
    message = schema_error(Pairs, pairs_table(*(pair(id=f"p{i}", weight=-1.0) for i in range(30))))
    assert message.splitlines()[0].startswith("data/x.parquet: 30 violations")
    assert len(message.splitlines()) == 11
    assert schema_error(Pairs, pairs_table(pair(split="x" * 500))).count("x") < 80


@pytest.mark.parametrize(
    "setting",
    [
        {"validation_enabled": False},
        {"validation_depth": ValidationDepth.SCHEMA_ONLY},
        {"validation_depth": ValidationDepth.DATA_ONLY},
    ],
)
def test_pandera_settings_do_not_disable_the_check(setting):
    with config_context(**setting):
        schema_error(Pairs, pairs_table(pair(split="test")))
        schema_error(Pairs, pairs_table(pair()).drop(columns="chosen"))


def test_environment_variables_do_not_disable_the_check():
    code = (
        "import pandas as pd; from dpo.data.schema import Pairs, validate_schema\n"
        f"validate_schema(Pairs, pd.DataFrame({[pair(split='test')]!r}), 'x')"
    )
    closed = {"PANDERA_VALIDATION_ENABLED": "False", "PANDERA_VALIDATION_DEPTH": "SCHEMA_ONLY"}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | closed, capture_output=True, text=True)
    assert "InputError: x: " in run.stderr
    assert "isin" in run.stderr
