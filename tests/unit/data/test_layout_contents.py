"""Everything that a row has is in its pair, reported as unread, or an error."""

import csv
import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.data.formats import LEFT_OUT, Spelling, convert, detect
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from dpo.data.settings import DataSettings
from dpo.data.turns import RowError
from tests.support.examples import examples
from tests.support.layouts import ANSWER, ASK, BAD, GOOD, OTHER, PLAIN, USER, one, sharegpt

FIELDS = {"prompt": ASK, "answer_1": GOOD, "answer_2": BAD}


def test_several_rejected_answers_are_paired_by_the_setting():
    row = {**PLAIN, "rejected": [BAD, "Who knows?"]}
    pairs = convert(row, Spelling(pairing="best_rest"), "pairs").pairs
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(GOOD, BAD), (GOOD, "Who knows?")]
    assert len(convert(row, Spelling(), "pairs").pairs) == 1


def test_conversations_that_part_before_the_last_turn_keep_all_later_turns():
    more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "The sea."}]
    pair = one({"chosen": [USER, ANSWER, *more], "rejected": [USER, OTHER]})
    assert (pair["prompt"], pair["rejected"], pair["rejected_turns"]) == (ASK, BAD, None)
    assert pair["chosen_turns"] == [ANSWER, *more]
    with pytest.raises(RowError, match="part at a turn of the user"):
        one({"chosen": [USER, ANSWER, *more], "rejected": [USER, ANSWER, {**USER, "content": "Else?"}, OTHER]})


def test_tools_calls_and_reasoning_are_kept():
    call = {"name": "flow", "arguments": {"river": "Elbe"}}
    tools = [{"name": "flow", "parameters": {"type": "object"}}]
    chosen = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {**call, "arguments": '{"river": "Elbe"}'}}],
    }
    rejected = {"from": "function_call", "value": json.dumps({**call, "arguments": {"river": "Oder"}})}
    pair = one({"prompt": ASK, "tools": json.dumps(tools), "chosen": chosen, "rejected": rejected})
    assert pair["tools"] == [{"type": "function", "function": tools[0]}]
    assert pair["chosen_turns"][0]["tool_calls"] == [{"type": "function", "function": call}]
    assert pair["chosen"] != pair["rejected"]
    thought = {**ANSWER, "reasoning_content": "Water flows down."}
    assert one({**PLAIN, "chosen": [thought]})["chosen_turns"] == [thought]


@pytest.mark.parametrize("name", ["chat_template_kwargs", "template_kwargs"])
@pytest.mark.parametrize("write", [dict, json.dumps, lambda value: {**value, "xml_tools": None}])
def test_variables_of_the_chat_template_are_kept(name, write):
    pair = one({**PLAIN, name: write({"enable_thinking": False})})
    assert pair["chat_template_kwargs"] == {"enable_thinking": False}
    assert one({**PLAIN, name: write({})})["chat_template_kwargs"] is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("enable_thinking", "not an object of variables"),
        ([{"enable_thinking": False}], "not an object of variables"),
        (True, "not an object of variables"),
        ({"messages": []}, "sets 'messages', which the pipeline sets"),
        ({"add_generation_prompt": False}, "sets 'add_generation_prompt'"),
        ({"day": datetime.date(2026, 1, 1)}, "cannot be written as JSON"),
    ],
)
def test_variables_that_cannot_be_used_cost_the_row(value, words):
    with pytest.raises(RowError, match=words) as error:
        one({**PLAIN, "chat_template_kwargs": value})
    assert error.value.rule == "wrong_type"


def test_a_json_list_of_rejected_texts_means_the_same_in_csv_and_jsonl(tmp_path):
    texts = [BAD, "Another answer."]
    rows = [{**PLAIN, "rejected": texts}, {**PLAIN, "prompt": "Else?", "rejected": texts[:1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(PLAIN))
        writer.writeheader()
        writer.writerows({**row, "rejected": json.dumps(row["rejected"])} for row in rows)
    tables = []
    for name in ("a.jsonl", "a.csv"):
        write_raw_pairs(
            read_files([str(tmp_path / name)]),
            tmp_path / "raw.parquet",
            name,
            DataSettings(source="default", pairing="best_rest"),
        )
        table = pq.read_table(tmp_path / "raw.parquet").drop_columns(["file", "line", "original", "source"])
        tables.append(table.to_pylist())
    assert tables[0] == tables[1]
    assert [row["rejected"] for row in tables[0]] == [*texts, BAD]


def test_a_rejected_answer_in_json_stays_a_text_if_the_chosen_one_is_json_too():
    answers = {"chosen": '["red", "blue"]', "rejected": '["red", "red"]'}
    assert one({**PLAIN, **answers})["rejected"] == answers["rejected"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**PLAIN, "images": ["a.png"]}, "field 'images' has content that is not read"),
        (
            {**PLAIN, "prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a part of type 'image_url'",
        ),
        ({**PLAIN, "document": "A long text."}, "field 'document' has content that is not read"),
        ({**PLAIN, "contexts": ["A long text."]}, "field 'contexts' has content that is not read"),
        ({**PLAIN, "prompt": [{**USER, "images": ["a.png"]}]}, r"field 'prompt\.images' has content"),
        ({**PLAIN, "prompt": [{**USER, "text": "More."}]}, r"field 'prompt\.text' has content"),
        (
            {"fields": {**FIELDS, "document": "x"}, "suggestions": {"a": {"value": "answer_1"}}},
            r"'fields\.document'",
        ),
        ({**PLAIN, "messages": [USER, {**ANSWER, "content": "Else."}]}, "field 'messages' has content"),
    ],
)
def test_content_that_is_not_read_costs_the_row(row, words):
    with pytest.raises(RowError, match=words) as error:
        one(row)
    assert error.value.rule == "unread_content"


def test_judgements_that_disagree_or_compare_nothing_are_no_preference():
    fields = {"prompt": ASK, "response_1": BAD, "response_2": GOOD}
    both = [{"value": "response_1"}, {"value": "response_2"}]
    for responses, words in (
        ({"best": both}, "2 responses disagree"),
        ({"note": [{"value": "Hm."}]}, "no response"),
    ):
        with pytest.raises(RowError, match=words) as error:
            one({"fields": fields, "responses": responses, "suggestions": {}})
        assert error.value.rule == "no_preference"


def test_a_conversation_that_python_wrote_without_commas_is_refused():
    row = {"chosen": f"[{USER}\n {ANSWER}]", "rejected": str([USER, OTHER])}  # as numpy writes it
    with pytest.raises(RowError, match="a conversation as Python writes it"):
        one(row)


def test_completions_that_the_pairing_leaves_out_are_noted():
    row = {"prompt": ASK, "responses": [GOOD, "Hm.", BAD], "scores": [3, 2, 1]}
    assert convert(row, Spelling(), "pairs").notes == [LEFT_OUT]
    assert convert(row, Spelling(pairing="best_rest"), "pairs").notes == []


def test_other_fields_are_reported_and_empty_ones_are_not():
    row = {**PLAIN, "source": ["wiki"], "language": "en", "images": [], "system": "", "score": 3, "meta": None}
    converted = convert(row, Spelling(), "pairs")
    assert converted.unread == ["language", "score"]
    assert converted.pairs[0]["source"] == "wiki"
    turn = {**USER, "weight": 1, "name": "Ann"}
    assert convert({**PLAIN, "prompt": [turn]}, Spelling(), "pairs").unread == ["prompt.name", "prompt.weight"]


def test_an_empty_list_of_tools_is_no_tools(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**PLAIN, "tools": "[]"}))
    write_raw_pairs(
        read_files([str(tmp_path / "a.jsonl")]), tmp_path / "raw.parquet", "a", DataSettings(source="a")
    )
    assert pq.read_table(tmp_path / "raw.parquet")["tools"].to_pylist() == [None]


def test_parts_of_reasoning_are_kept():
    parts = [{"type": "reasoning", "value": "Water flows down."}, {"type": "text", "value": GOOD}]
    row = {"chosen_messages": [USER, {**ANSWER, "content": parts}], "rejected_messages": [USER, OTHER]}
    assert one(row)["chosen_turns"] == [{**ANSWER, "reasoning_content": "Water flows down."}]
    parts[0] = {"type": "thinking", "thinking": "Water flows down."}
    assert one(row)["chosen_turns"] == [{**ANSWER, "reasoning_content": "Water flows down."}]


def test_columns_and_roles_of_the_source_are_mapped():
    row = {"frage": [{"role": "kunde", "content": ASK}], "gut": GOOD, "schlecht": BAD}
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    assert one(row, columns=columns, roles={"kunde": "user"}) == one(PLAIN)
    with pytest.raises(RowError, match=r"role 'kunde' is none of .*map it in data\.roles"):
        one(row, columns=columns)


def test_rows_of_single_responses_are_refused_with_the_conversion():
    row = {"prompt": ASK, "response": GOOD, "helpfulness": 4, "correctness": 3}
    with pytest.raises(InputError, match=r"as in HelpSteer2; combine the rows of a prompt: table.groupby"):
        detect([row], "a.jsonl", Spelling())


def test_nulls_that_parquet_adds_to_calls_are_no_arguments(tmp_path):
    calls = [{"function": {"name": "flow", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})]
    rows = [{"prompt": ASK, "chosen": [{**ANSWER, "tool_calls": [call]}], "rejected": BAD} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [raw.row["chosen"][0]["tool_calls"] for raw in read_files([str(tmp_path / "a.parquet")])]
    assert read == [[call] for call in calls]


@pytest.mark.parametrize("split", ["train_prefs", ("train_prefs", "test_prefs")])
def test_splits_of_a_folder_are_selected(tmp_path, split):
    for name in ("train_prefs", "train_sft", "test_prefs", "test_gen"):
        table = pa.Table.from_pylist([{**PLAIN, "prompt": f"{name} {n}"} for n in range(3)])
        pq.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    params = DataSettings(source="default", split=split)
    rows = [raw.row for raw in read_files([str(tmp_path)], params.splits)]
    assert {row["prompt"].split()[0] for row in rows} == set(params.splits)
    with pytest.raises(
        InputError, match=r"data.split: .* has no split 'dev'; use test_gen, test_prefs, train_prefs"
    ):
        list(read_files([str(tmp_path)], ["dev"]))


pieces = st.sampled_from(["a", "b", " ", "\n", "[", "{", "é", "Human:", "\n\nAssistant:", "\ud83d"])
any_text = st.lists(pieces, max_size=5).map("".join)


@examples(300)
@given(any_text, any_text, any_text)
def test_plain_texts_are_converted_as_in_general(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    results = []
    for given_row in (row, {**row, "note": None}):
        try:
            results.append(convert(given_row, Spelling(), "pairs"))
        except RowError as error:
            results.append((error.rule, error.reason))
    assert results[0] == results[1]


words = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=4, max_size=9)
prompts = st.lists(words, min_size=1, max_size=4, unique=True)


@examples(150)
@given(prompts, words, words, st.booleans(), st.sampled_from(["turns", "sharegpt", "whole", "history", "json"]))
def test_every_text_of_a_row_is_in_its_pair(texts, chosen, rejected, system, form):
    roles = ["user", "assistant"] * 2
    texts = texts[: len(texts) - (len(texts) % 2 == 0)]
    turns = [
        {"role": role, "content": f"{text} {n}"} for n, (role, text) in enumerate(zip(roles, texts, strict=False))
    ]
    given_turns = [{"role": "system", "content": "system text"}, *turns] if system else turns
    good, bad = ({"role": "assistant", "content": text} for text in (f"{chosen} good", f"{rejected} bad"))
    row = {
        "turns": {"prompt": given_turns, "chosen": [good], "rejected": [bad]},
        "sharegpt": {
            "conversations": list(map(sharegpt, given_turns)),
            "chosen": sharegpt(good),
            "rejected": sharegpt(bad),
        },
        "whole": {"chosen": [*given_turns, good], "rejected": [*given_turns, bad]},
        "history": {
            **({"system": "system text"} if system else {}),
            **{"history": turns[:-1], "prompt": turns[-1]["content"]},
            **{"chosen": good["content"], "rejected": bad["content"]},
        },
        "json": {"prompt": json.dumps(given_turns), "chosen": json.dumps([good]), "rejected": json.dumps([bad])},
    }[form]
    pair = one(row)
    assert (pair["turns"] or [{"role": "user", "content": pair["prompt"]}]) == given_turns
    assert (pair["chosen"], pair["rejected"]) == (good["content"], bad["content"])
