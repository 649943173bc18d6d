"""Rows that cannot be converted, and random rows: the rule that they break and its reason."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.data.formats import Spelling, convert, detect
from dpo.data.layouts import LAYOUTS
from dpo.data.turns import RowError
from tests.support.examples import examples
from tests.support.rows import (
    ASK,
    BORE,
    HH,
    JOY,
    RANKED,
    RATED,
    SYSTEM,
    TEXTS,
    ULTRAFEEDBACK,
    WHY,
    pairs_of,
    turned,
)


def broken_rule(row, layout="pairs"):
    with pytest.raises(RowError) as error:
        pairs_of(row, "best_rest", layout)
    assert error.value.reason == str(error.value) != ""
    error.value.reason.encode()
    return error.value.rule


BROKEN = {
    "missing_text": [
        {**TEXTS, "prompt": None},
        {**TEXTS, "chosen": None},
        {**TEXTS, "rejected": None},
        {"chosen": None, "rejected": [ASK, BORE]},
        {"chosen": [ASK, JOY], "rejected": None},
        {"chosen": [ASK, {"role": "assistant", "content": None}], "rejected": [ASK, BORE]},
        {**HH, "rejected": None},
        {**ULTRAFEEDBACK, "instruction": None},
        {"prompt": "a", "completions": [{"response": None, "score": 1}]},
        {"prompt": "a", "completions": [{"score": 1}]},
        {"prompt": "a", "completions": [{"text": "b"}]},
        {"prompt": "a", "completions": "b"},
        {"prompt": "a", "completions": ["b", "c"]},
        {"chosen": "no prompt", "rejected": "neither"},
        {**TEXTS, "prompt": []},
        {**TEXTS, "chosen": []},
        {"chosen": [], "rejected": [ASK, BORE]},
        {"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"},
        turned(),
        turned(JOY),
        {**RATED, "prompt": None},
        {**RATED, "responses": ["a", None, "b"]},
        {**RATED, "scores": None},
    ],
    "wrong_type": [
        {**TEXTS, "prompt": 3},
        {**TEXTS, "chosen": 3},
        {**TEXTS, "rejected": {"text": "a"}},
        {**TEXTS, "rejected": [3]},
        {**TEXTS, "chosen": [{"content": "a"}]},
        {"chosen": [ASK, {"role": "assistant", "content": [3]}], "rejected": [ASK, BORE]},
        {"chosen": [ASK, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "rejected": [ASK, BORE]},
        {**HH, "rejected": 3},
        {"prompt": "a", "completions": [{"text": 3, "score": 1}]},
        {"prompt": "a", "completions": [{"text": "b", "rating": "N/A"}]},
        {**RATED, "responses": "a"},
        {**RATED, "responses": ["a", 3, "b"]},
        {**RATED, "scores": 3},
        {**RATED, "scores": [1, 2]},
        {**RATED, "scores": [1, 2, None]},
        {**RATED, "scores": [1, 2, math.nan]},
        {**RATED, "scores": [1, 2, True]},
        {**RATED, "scores": [1, 2, 10**400]},
        {**RANKED, "ranks": [1, 2, 3, 4]},
        {**TEXTS, "tools": "search"},
    ],
    "broken_roles": [
        {"chosen": [ASK, JOY], "rejected": "a"},
        turned({"role": ["user"], "content": "a"}),
        turned({"role": "\ud800", "content": "a"}),
        turned(ASK, SYSTEM),
        turned(SYSTEM),
        turned(SYSTEM, SYSTEM, ASK),
        turned(ASK, JOY),
        {"chosen": [ASK], "rejected": [ASK]},
        {"chosen": [ASK, JOY], "rejected": [WHY, BORE]},
        {"prompt": "Film 4?", **turned(ASK)},
        {"prompt": [SYSTEM, ASK], **turned({**SYSTEM, "content": "Be long."}, ASK)},
        {**TEXTS, "prompt": [ASK, BORE, WHY, {**JOY, "content": "Else."}]},
        {**TEXTS, "chosen": [ASK]},
        {**HH, "rejected": "\n\nHuman: a"},
        {**HH, "rejected": "\n\nHuman: b\n\nAssistant: c"},
        {**HH, "rejected": "no transcript"},
        {**HH, "rejected": "Note\n\nHuman: a\n\nAssistant: c"},
    ],
    "no_preference": [
        {**RATED, "scores": [1, 1, 1]},
        {**RANKED, "ranks": [1, 1, 1]},
        {**RATED, "responses": ["a"], "scores": [1]},
        {**ULTRAFEEDBACK, "completions": [{"response": "a", "score": 1}]},
    ],
    "unread_content": [
        {**TEXTS, "images": ["a.png"]},
        {**TEXTS, "prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        {**TEXTS, "question": "Another one?"},
        {**TEXTS, "messages": [ASK, {**JOY, "content": "Another answer."}]},
        {**RATED, "documents": "A long text."},
    ],
    "unknown_label": [
        {"prompt": "Film 4?", "completion": "A joy.", "label": label} for label in ("", "perhaps", 3)
    ],
    "unknown_split": [{**TEXTS, "split": split} for split in ("holdout", "Train", 1, False, ["train"], "\ud800")],
    "lone_surrogate": [
        {**TEXTS, "prompt": "a \ud83d"},
        {**TEXTS, "chosen": "\udc00"},
        {**TEXTS, "rejected": "a\udfffb"},
        turned(ASK, JOY, {"role": "user", "content": "\ud83d"}),
        {**HH, "rejected": f"{HH['rejected']} \ud83d"},
        {**RATED, "responses": ["a", "\ud83d", "b"]},
    ],
    "invalid_utf8": [
        {**TEXTS, "prompt": b"caf\xe9".decode(errors="surrogateescape")},
        {**TEXTS, "chosen": b"\x80".decode(errors="surrogateescape")},
    ],
}


@pytest.mark.parametrize(("rule", "row"), [(rule, row) for rule, rows in BROKEN.items() for row in rows])
def test_an_inconvertible_row_breaks_the_rule(rule, row):
    assert broken_rule(row) == rule


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_another_layout_breaks_missing_text(layout):
    assert broken_rule({"other": "a"}, layout) == "missing_text"


@pytest.mark.parametrize(
    "value",
    [
        *({"weight": 0}, {"weight": "much"}, {"agreement": 1.01}, {"agreement": [1]}, {"chosen_rating": math.inf}),
        *({"id": True}, {"id": "\ud83d"}, {"source": [3]}, {"source": {"name": "x"}}),
    ],
)
def test_metadata_of_another_type_is_not_read_and_costs_no_row(value):
    converted = convert({**TEXTS, **value}, Spelling(), "pairs")
    assert converted.unread == list(value)
    assert converted.pairs == pairs_of(TEXTS)


def test_reasons_name_field_and_value():
    with pytest.raises(RowError, match="'chosen' is int '3', not turns"):
        pairs_of({**TEXTS, "chosen": 3})
    with pytest.raises(RowError, match="'scores' is 'much', not a number"):
        pairs_of({**RATED, "scores": ["much", 1, 2]})
    with pytest.raises(RowError, match="split 'holdout' is not one of train, eval, test"):
        pairs_of({**TEXTS, "split": "holdout"})
    with pytest.raises(RowError, match="byte 0xe9 is not UTF-8"):
        pairs_of({**TEXTS, "chosen": "caf\udce9"})


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [deep(2000), [3.5] * 100, {"a": {"b": deep(2000)}}])
def test_reasons_are_short_for_large_and_deep_values(value):
    turns = [ASK, {"role": "assistant", "content": value}]
    for row in (
        {"chosen": turns, "rejected": turns},
        {**TEXTS, "split": value},
        {**TEXTS, "chosen": [{"role": value, "content": "a"}]},
        {**RATED, "scores": [1, 2, value]},
    ):
        with pytest.raises(RowError) as error:
            pairs_of(row)
        assert len(error.value.reason) < 200


FIELDS = [
    *("prompt", "instruction", "chosen", "rejected", "completions", "responses", "scores", "ratings", "ranks"),
    *("rankings", "id", "weight", "agreement", "source", "timestamp", "split", "label", "completion"),
    *("chosen_rating", "rejected_rating"),
]
strings = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from(["", "train", "dev", "3", "a\ud83d", "\udcff", "\n\nHuman: a\n\nAssistant: b", "Human:x"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), strings)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", None]), "content": strings | scalars}
)
completion = st.fixed_dictionaries(
    {},
    optional={
        field: strings | scalars
        for field in ("response", "text", "content", "completion", "score", "overall_score", "rating")
    },
)
values = st.recursive(
    st.one_of(scalars, turn, completion),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["role", "content", *FIELDS]) | strings, inner, max_size=4),
    ),
    max_leaves=8,
)
likely = st.one_of(
    values,
    strings,
    st.lists(turn, max_size=4),
    st.lists(completion, max_size=3),
    st.lists(strings, max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
)
rows = st.dictionaries(st.sampled_from(FIELDS) | strings, likely, max_size=6) | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(FIELDS, likely)
)


def pairs_or_rule(row, layout, pairing="best_rest"):
    try:
        return pairs_of(row, pairing, layout), None
    except RowError as error:
        error.reason.encode()
        return [], error.rule


@examples(300)
@given(rows, st.sampled_from(["best_worst", "best_rest"]))
def test_any_row_gives_pairs_or_a_row_error(row, pairing):
    for layout in LAYOUTS:
        pairs, rule = pairs_or_rule(row, layout, pairing)
        assert rule in BROKEN if rule else pairs
        for pair in pairs:
            for field in ("id", "prompt", "chosen", "rejected"):
                pair[field].encode()
            for turn_ in pair["turns"] or []:
                turn_["content"].encode()
            assert pair["split"] in ("train", "eval", None)


def chat(text):
    return st.lists(st.builds(lambda content: {"role": "user", "content": content}, text), min_size=1, max_size=1)


well_formed = st.one_of(
    st.fixed_dictionaries({"prompt": strings | chat(strings), "chosen": strings, "rejected": strings}),
    st.builds(
        lambda prompt, good, bad: {
            "chosen": [*prompt, {"role": "assistant", "content": good}],
            "rejected": [*prompt, {"role": "assistant", "content": bad}],
        },
        chat(strings),
        strings,
        strings,
    ),
    st.builds(
        lambda prompt, good, bad: {
            "chosen": f"\n\nHuman: {prompt}\n\nAssistant: {good}",
            "rejected": f"\n\nHuman: {prompt}\n\nAssistant: {bad}",
        },
        strings,
        strings,
        strings,
    ),
    st.fixed_dictionaries(
        {
            "prompt": strings,
            "responses": st.lists(strings, min_size=2, max_size=2),
            "ranks": st.permutations([1, 2]),
        }
    ),
)


@examples(200)
@given(well_formed)
def test_a_well_formed_row_gives_pairs_unless_its_text_is_invalid(row):
    pairs, rule = pairs_or_rule(row, "pairs")
    invalid = {"lone_surrogate", "invalid_utf8", "broken_roles"}  # a text can be a transcript of its own
    assert rule in invalid if rule else len(pairs) == 1


@examples(300)
@given(st.lists(rows, max_size=3))
def test_any_rows_have_a_known_format_or_raise_input_error(some):
    with contextlib.suppress(InputError):
        assert detect(some, "x", Spelling()) in Spelling().layouts
