"""Formats of a row, and the rules that inconvertible rows break."""

import contextlib
import datetime
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.data.formats import Spelling, convert, detect, layout_of
from dpo.data.layouts import LAYOUTS
from dpo.data.turns import RowError
from tests.support.examples import examples

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Film 3?"}
WHY = {"role": "user", "content": "Why?"}
JOY = {"role": "assistant", "content": "A joy."}
BORE = {"role": "assistant", "content": "A bore."}
TEXTS = {"prompt": "Film 3?", "chosen": "A joy.", "rejected": "A bore."}
ULTRAFEEDBACK = {
    "instruction": "Film 3?",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "Fair.", "overall_score": 5.0},
        {"model": "b", "response": "A joy.", "overall_score": 9},
        {"model": "c", "response": "A bore.", "overall_score": "1.5"},
    ],
}
RATED = {"prompt": "Film 3?", "responses": ["Fair.", "A joy.", "A bore."], "scores": [0.5, 0.9, 0.1]}
RANKED = {"prompt": "Film 3?", "responses": ["Fair.", "A joy.", "A bore."], "ranks": [2, 1, 3]}
SCORED_BEST_REST = [("A joy.", "Fair."), ("A joy.", "A bore.")]


def pairs_of(row, pairing="best_worst", layout="pairs"):
    return convert(row, Spelling(pairing=pairing), layout).pairs


def pair_of(row):
    (pair,) = pairs_of(row)
    return pair


def broken_rule(row, layout="pairs"):
    with pytest.raises(RowError) as error:
        pairs_of(row, "best_rest", layout)
    assert error.value.reason == str(error.value) != ""
    error.value.reason.encode()
    return error.value.rule


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        (TEXTS, "pairs"),
        ({**TEXTS, "prompt": [ASK]}, "pairs"),
        ({"chosen": [ASK, JOY], "rejected": [ASK, BORE]}, "pairs"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "pairs"),
        (ULTRAFEEDBACK, "rated completions"),
        (RATED, "rated completions"),
        (RANKED, "rated completions"),
    ],
)
def test_each_layout_is_detected(row, layout):
    assert layout_of(row, Spelling()) == layout
    assert detect([{}, {"chosen": 1}, row], "x", Spelling()) == layout


def test_the_most_frequent_layout_is_detected_and_each_row_is_read_in_its_own():
    assert detect([RATED, TEXTS, TEXTS], "x", Spelling()) == "pairs"
    assert detect([RATED, RATED, TEXTS], "x", Spelling()) == "rated completions"
    assert convert(RATED, Spelling(), "pairs").layout == "rated completions"


def test_texts_are_not_changed():
    pair = pair_of({"prompt": " Film 3?\n", "chosen": " A joy.", "rejected": "A bore.  "})
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (" Film 3?\n", " A joy.", "A bore.  ")
    assert pair["turns"] is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [JOY], "rejected": [BORE]},
        {"prompt": "Film 3?", "chosen": [JOY], "rejected": [BORE]},
        {"prompt": "Film 3?", "chosen": [ASK, JOY], "rejected": [ASK, BORE]},
        {"prompt": [ASK], "chosen": [ASK, JOY], "rejected": [ASK, BORE]},
        {"chosen": [ASK, JOY], "rejected": [ASK, BORE]},
        {"instruction": "Film 3?", "chosen": "A joy.", "rejected": "A bore."},
        {"prompt": None, "instruction": "Film 3?", "chosen": "A joy.", "rejected": "A bore."},
    ],
)
def test_a_single_turn_conversation_equals_a_pair_of_texts(row):
    assert pair_of(row) == pair_of(TEXTS)


SYSTEM_TEXT = "System: Be brief.\n\nUser: Film 3?\n\nAssistant:"
LONG_TEXT = "User: Film 3?\n\nAssistant: A joy.\n\nUser: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([SYSTEM, ASK], SYSTEM_TEXT),
        ([ASK, JOY, WHY], LONG_TEXT),
        ([SYSTEM, ASK, JOY, WHY], f"System: Be brief.\n\n{LONG_TEXT}"),
    ],
)
def test_a_conversation_keeps_its_turns_and_its_prompt_is_a_transcript(turns, text):
    full = {"chosen": [*turns, JOY], "rejected": [*turns, BORE]}
    for row in (
        full,
        {"prompt": turns, "chosen": [JOY], "rejected": [BORE]},
        {"prompt": turns, "chosen": "A joy.", "rejected": "A bore."},
        {"prompt": turns, **full},
        {"prompt": f"{turns[-1]['content']} ", **full},
    ):
        pair = pair_of(row)
        assert pair["prompt"] == text
        assert pair["turns"] == turns
        assert (pair["chosen"], pair["rejected"]) == ("A joy.", "A bore.")


def test_turns_keep_only_role_and_content():
    row = {"chosen": [{**SYSTEM, "name": "x"}, {**ASK, "id": 1}, JOY], "rejected": [SYSTEM, ASK, BORE]}
    assert pair_of(row)["turns"] == [SYSTEM, ASK]


@pytest.mark.parametrize(
    ("opening", "turns"),
    [
        ("\n\nHuman: Film 3?\n\nAssistant:", [ASK]),
        ("Human: Film 3?\n\nAssistant:", [ASK]),
        ("\n\nHuman: Film 3?\n\nAssistant: A joy.\n\nHuman: Why?\n\nAssistant:", [ASK, JOY, WHY]),
    ],
)
def test_the_prompt_of_transcripts_ends_before_the_last_answer(opening, turns):
    pair = pair_of({"chosen": f"{opening} A joy, a delight.", "rejected": f"{opening} A joyless bore."})
    assert pair["prompt"].strip() == opening.strip()
    assert pair["turns"] == turns
    assert (pair["chosen"], pair["rejected"]) == ("A joy, a delight.", "A joyless bore.")


@pytest.mark.parametrize("row", [ULTRAFEEDBACK, RATED, RANKED])
@pytest.mark.parametrize(
    ("pairing", "texts"), [("best_worst", [("A joy.", "A bore.")]), ("best_rest", SCORED_BEST_REST)]
)
def test_the_best_completion_is_paired_with_the_worst_or_each_other_one(row, pairing, texts):
    pairs = pairs_of(row, pairing)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == texts
    assert all(pair["prompt"] == "Film 3?" and pair["turns"] is None for pair in pairs)


@pytest.mark.parametrize("row", [ULTRAFEEDBACK, RATED])
def test_the_chosen_completion_is_rated_higher(row):
    assert all(pair["chosen_rating"] > pair["rejected_rating"] for pair in pairs_of(row, "best_rest"))


def test_ratings_of_completions_are_kept():
    (pair,) = pairs_of(ULTRAFEEDBACK)
    assert (pair["chosen_rating"], pair["rejected_rating"]) == (9.0, 1.5)
    assert [pair["rejected_rating"] for pair in pairs_of(RATED, "best_rest")] == [0.5, 0.1]


def test_completions_tied_with_the_best_are_not_paired_with_it():
    tied = {"prompt": "Film 3?", "responses": ["a", "b", "c", "d"], "scores": [1, 2, 2, 0]}
    assert [(p["chosen"], p["rejected"]) for p in pairs_of(tied, "best_rest")] == [("b", "a"), ("b", "d")]
    assert [(p["chosen"], p["rejected"]) for p in pairs_of(tied)] == [("b", "d")]


def test_rated_responses_to_a_conversation_keep_its_turns():
    (pair,) = pairs_of({**RATED, "prompt": [ASK, JOY, WHY]})
    assert (pair["prompt"], pair["turns"]) == (LONG_TEXT, [ASK, JOY, WHY])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer_0": "b"},
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "responses": ["b", "c"]},
        {"completions": [], "scores": []},
    ],
)
def test_an_unknown_layout_is_rejected_with_the_fields(row):
    with pytest.raises(InputError) as error:
        detect([row], "data.jsonl", Spelling())
    assert str(error.value).startswith("data.jsonl: unknown layout")
    assert all(repr(field) in str(error.value).split(";")[0] for field in row)


def test_rows_without_fields_are_rejected():
    with pytest.raises(InputError, match="found no field"):
        detect([{}], "x", Spelling())


def turned(*turns):
    return {"chosen": [*turns, JOY], "rejected": [*turns, BORE]}


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
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


NO_TURNS = dict.fromkeys(("turns", "chosen_turns", "rejected_turns", "tools", "chat_template_kwargs"))


def test_optional_columns_are_kept():
    known = {
        "id": "p7",
        "split": "eval",
        "source": "forum",
        "weight": 2.0,
        "agreement": 0.75,
        "chosen_rating": 4.0,
        "rejected_rating": -1.0,
    }
    assert pair_of({**TEXTS, **known, "timestamp": {}, "other": 1}) == {**TEXTS, **NO_TURNS, **known}


@pytest.mark.parametrize("row", [TEXTS, HH, turned(ASK), ULTRAFEEDBACK, RATED])
def test_every_format_accepts_optional_columns(row):
    pair = pair_of({**row, "source": "forum", "split": "test", "agreement": "1", "id": 7})
    assert (pair["source"], pair["split"], pair["agreement"], pair["id"]) == ("forum", "eval", 1.0, "7")
    assert pair["weight"] is None


def test_dates_are_converted_to_text():
    time = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    assert pair_of({**TEXTS, "source": time})["source"] == "2024-05-01T12:30:00+00:00"
    assert pair_of({**TEXTS, "source": time.date()})["source"] == "2024-05-01"
    assert pair_of({**TEXTS, "source": 1714521600})["source"] == "1714521600"


@pytest.mark.parametrize("field", ["id", "split", "source", "weight", "agreement", "chosen_rating"])
@pytest.mark.parametrize("nothing", [None, "", math.nan])
def test_optional_columns_can_be_empty(field, nothing):
    assert pair_of({**TEXTS, field: nothing}) == pair_of(TEXTS)


@pytest.mark.parametrize(
    ("alias", "split"),
    [
        ("train", "train"),
        ("eval", "eval"),
        ("test", "eval"),
        ("validation", "eval"),
        ("valid", "eval"),
        ("dev", "eval"),
    ],
)
def test_split_aliases(alias, split):
    assert pair_of({**TEXTS, "split": alias})["split"] == split


def test_the_default_id_depends_on_the_texts_only():
    assert pair_of(TEXTS)["id"] == pair_of({**TEXTS, "source": "x", "weight": 3})["id"] == "0ba46320ead6426f"
    changed = [pair_of({**TEXTS, field: "other"})["id"] for field in TEXTS]
    swapped = pair_of({**TEXTS, "chosen": TEXTS["rejected"], "rejected": TEXTS["chosen"]})["id"]
    assert len({pair_of(TEXTS)["id"], swapped, *changed}) == 5


def test_pairs_of_the_same_row_have_numbered_ids():
    assert [pair["id"] for pair in pairs_of({**RATED, "id": "p7"}, "best_rest")] == ["p7/0", "p7/1"]
    assert [pair["id"] for pair in pairs_of({**RATED, "id": "p7"})] == ["p7"]
    assert len({pair["id"] for pair in pairs_of(RATED, "best_rest")}) == 2


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


def test_ranks_are_not_stored_as_ratings():
    (pair,) = pairs_of(RANKED)
    assert (pair["chosen"], pair["rejected"]) == ("A joy.", "A bore.")
    assert pair["chosen_rating"] is None
    assert pair["rejected_rating"] is None
