"""The contract of the canonical tables: what keeps it passes, every breach is named."""

import os
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pytest
from pandera.config import ValidationDepth, config_context

from dpo.common.errors import InputError
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA, Pairs, RawPairs, hold

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
        "timestamp": "2024-01-01",
    }
    return {**row, **changes}


def candidate(**changes):
    place = {"file": "a.jsonl", "line": 1, "original": "{}", "rule": None, "reason": None}
    return pair(**{**place, **changes})


def fault(**changes):
    return candidate(**{**dict.fromkeys(pair()), "rule": "wrong_type", "reason": "a number", **changes})


def pairs_table(*rows):
    return pa.Table.from_pylist(list(rows), PAIRS_SCHEMA).to_pandas()


def candidates_table(*rows):
    return pa.Table.from_pylist(list(rows), RAW_PAIRS_SCHEMA).to_pandas()


def refused(model, table):
    with pytest.raises(InputError) as error:
        hold(model, table, "data/x.parquet")
    message = str(error.value)
    assert message.startswith("data/x.parquet: ")
    assert f"`{model.__name__}`" in message
    return message


def test_the_models_have_the_fields_of_the_schemas():
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
        dict.fromkeys(("weight", "agreement", "chosen_rating", "rejected_rating", "timestamp")),
    ],
)
def test_a_sound_pair_keeps_both_contracts(changes):
    table = pairs_table(pair(**changes), pair(id="p2"))
    pd.testing.assert_frame_equal(hold(Pairs, table, "x"), table)
    hold(RawPairs, candidates_table(candidate(**changes), candidate(**changes)), "x")


def test_empty_tables_keep_both_contracts():
    hold(Pairs, pairs_table(), "x")
    hold(RawPairs, candidates_table(), "x")


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
def test_a_breach_of_both_contracts_is_refused_by_both(rule, changes):
    (field,) = changes
    for model, table in (
        (Pairs, pairs_table(pair(), pair(id="p2", **changes))),
        (RawPairs, candidates_table(candidate(), candidate(**changes))),
    ):
        message = refused(model, table)
        assert "1 breaches" in message
        assert f"row 2, field '{field}': {rule}" in message


@pytest.mark.parametrize(("rule", "changes"), [(rule, row) for rule, rows in PAIRS_ONLY.items() for row in rows])
def test_what_is_not_sound_is_refused_as_a_pair_alone(rule, changes):
    message = refused(Pairs, pairs_table(pair(), pair(**{"id": "p2", **changes})))
    assert "row 2" in message
    assert rule in message
    hold(RawPairs, candidates_table(candidate(), fault(**changes)), "x")


def test_an_id_stands_twice_among_candidates_alone():
    assert "field 'id': field_uniqueness" in refused(Pairs, pairs_table(pair(), pair()))
    hold(RawPairs, candidates_table(candidate(), candidate()), "x")


@pytest.mark.parametrize("field", ["file", "line", "original"])
def test_a_candidate_has_its_place(field):
    table = candidates_table(candidate(), candidate(**{field: None}))
    assert f"field '{field}'" in refused(RawPairs, table)


@pytest.mark.parametrize("field", ["id", "prompt", "chosen", "rejected", "split", "source"])
def test_a_candidate_is_a_pair_or_has_the_rule_that_it_breaks(field):
    assert "row 1, field" in (
        message := refused(RawPairs, candidates_table(candidate(**{field: None}), candidate()))
    )
    assert "a pair, or a rule that it breaks" in message
    hold(RawPairs, candidates_table(fault(), fault()), "x")
    refused(RawPairs, candidates_table(fault(reason=None)))


@pytest.mark.parametrize(
    ("model", "make", "row"), [(Pairs, pairs_table, pair()), (RawPairs, candidates_table, candidate())]
)
def test_columns_are_those_of_the_contract(model, make, row):
    assert "'surprise'" in refused(model, make(row).assign(surprise=1))
    for field in row:
        assert f"'{field}'" in refused(model, make(row).drop(columns=field))


@pytest.mark.parametrize(
    ("field", "value"), [("id", 7), ("prompt", 1.5), ("weight", "much"), ("agreement", 1), ("source", True)]
)
def test_nothing_is_turned_into_the_wanted_type(field, value):
    assert f"field '{field}': dtype" in refused(Pairs, pairs_table(pair()).assign(**{field: value}))


def test_ten_breaches_are_shown_and_all_are_counted():
    message = refused(Pairs, pairs_table(*(pair(id=f"p{i}", weight=-1.0) for i in range(30))))
    assert message.splitlines()[0].startswith("data/x.parquet: 30 breaches")
    assert len(message.splitlines()) == 11
    assert refused(Pairs, pairs_table(pair(split="x" * 500))).count("x") < 80


@pytest.mark.parametrize(
    "gate",
    [
        {"validation_enabled": False},
        {"validation_depth": ValidationDepth.SCHEMA_ONLY},
        {"validation_depth": ValidationDepth.DATA_ONLY},
    ],
)
def test_no_setting_of_pandera_opens_the_gate(gate):
    with config_context(**gate):
        refused(Pairs, pairs_table(pair(split="test")))
        refused(Pairs, pairs_table(pair()).drop(columns="chosen"))


def test_no_environment_variable_opens_the_gate():
    code = (
        "import pandas as pd; from dpo.data.schema import Pairs, hold\n"
        f"hold(Pairs, pd.DataFrame({[pair(split='test')]!r}), 'x')"
    )
    closed = {"PANDERA_VALIDATION_ENABLED": "False", "PANDERA_VALIDATION_DEPTH": "SCHEMA_ONLY"}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | closed, capture_output=True, text=True)
    assert "InputError: x: " in run.stderr
    assert "isin" in run.stderr
