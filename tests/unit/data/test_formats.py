"""Formats of a row, and its optional columns."""

import datetime
import math

import pytest

from dpo.common.errors import InputError
from dpo.data.formats import Spelling, convert, detect, layout_of
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

SCORED_BEST_REST = [("A joy.", "Fair."), ("A joy.", "A bore.")]


def pair_of(row):
    (pair,) = pairs_of(row)
    return pair


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


def test_ranks_are_not_stored_as_ratings():
    (pair,) = pairs_of(RANKED)
    assert (pair["chosen"], pair["rejected"]) == ("A joy.", "A bore.")
    assert pair["chosen_rating"] is None
    assert pair["rejected_rating"] is None
