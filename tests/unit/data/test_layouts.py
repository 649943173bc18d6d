"""Layouts of public data sets give the same pairs as plain columns."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.data.formats import REPEATED_PROMPT, Spelling, convert, layout_of
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from dpo.data.settings import DataSettings
from dpo.engine.chat import read_turns
from tests.support.layouts import ANSWER, ASK, BAD, GOOD, OTHER, PLAIN, USER, one, sharegpt

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
HH = f"\n\nHuman: {ASK}\n\nAssistant:"
SINGLE_TURN = {
    "texts": PLAIN,
    "Orca without a system prompt": {"question": ASK, "chosen": GOOD, "rejected": BAD},
    "ms-swift query": {"query": ASK, "response": GOOD, "rejected_response": BAD},
    "ms-swift messages": {"messages": [USER, ANSWER], "rejected_response": BAD},
    "ms-swift rejected messages": {"messages": [USER, ANSWER], "rejected_messages": [USER, OTHER]},
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [ANSWER],
        "non_preferred_output": [OTHER],
    },
    "ShareGPT": {"conversations": [sharegpt(USER)], "chosen": sharegpt(ANSWER), "rejected": sharegpt(OTHER)},
    "messages and objects": {"messages": [USER], "chosen": ANSWER, "rejected": OTHER},
    "parts of text": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": ASK}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}],
    },
    "JSON in texts": {"prompt": json.dumps([USER]), "chosen": json.dumps([ANSWER]), "rejected": json.dumps(OTHER)},
    "JSON in texts without a prompt": {
        "chosen": json.dumps([USER, ANSWER]),
        "rejected": json.dumps([USER, OTHER]),
    },
    "HelpSteer3": {"context": [USER], "response1": BAD, "response2": GOOD, "overall_preference": 2},
    "PKU-SafeRLHF": {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1},
    "SHP": {"history": ASK, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    "Chatbot Arena": {"conversation_a": [USER, OTHER], "conversation_b": [USER, ANSWER], "winner": "model_b"},
    "Alpaca ranking": {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
    "Label Studio": {
        "data": {"prompt": ASK, "answer1": GOOD, "answer2": BAD},
        "annotations": [{"result": [{"value": {"selected": "left"}}]}],
    },
    "UltraFeedback binarized": {
        **{"prompt": ASK, "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
        **{"score_chosen": None, "score_rejected": None},
    },
    "Label Studio, right side": {
        "data": json.dumps({"prompt": ASK, "left": BAD, "right": GOOD}),
        "annotations": json.dumps(
            [
                {"was_cancelled": True, "result": [{"value": {"selected": "left"}}]},
                {"was_cancelled": False, "result": [{"value": {"selected": "right"}}]},
            ]
        ),
    },
    "Label Studio, list": {
        "data": {"prompt": ASK, "completions": [GOOD, BAD]},
        "annotations": [{"result": [{"value": {"choices": ["A"]}}]}],
    },
    "Label Studio, JSON-MIN": {"prompt": ASK, "answer1": BAD, "answer2": GOOD, "comparison": "right"},
    "Argilla 1, record": {
        "fields": {"prompt": ASK, "response1": BAD, "response2": GOOD},
        "responses": [
            {
                "status": "submitted",
                "values": {
                    "preference": {"value": [{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}]}
                },
            },
            {"status": "discarded", "values": {"preference": {"value": [{"value": "response1", "rank": 1}]}}},
        ],
        "suggestions": [{"question_name": "preference", "value": "response1"}],
    },
    "Argilla 1, suggestion": {
        "fields": {"prompt": ASK, "response1": BAD, "response2": GOOD},
        "responses": [],
        "suggestions": [
            {
                "question_name": "preference",
                "value": [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}],
            }
        ],
    },
    "Argilla 1, columns": {
        **{"prompt": ASK, "response-1": GOOD, "response-2": BAD, "ranking-suggestion": None},
        "ranking": [{"status": "submitted", "value": {"rank": [1, 2], "value": ["response-1", "response-2"]}}],
    },
    "Argilla 2, suggestion": {
        "fields": {"chat": [USER], "response_1": BAD, "response_2": GOOD},
        **{"suggestions": {"preference": {"value": "response_2", "agent": "a"}}, "responses": {}},
    },
    "Argilla 2, response": {
        "fields": {"prompt": ASK, "response_1": BAD, "response_2": GOOD},
        "suggestions": {"preference": {"value": "response_1"}},
        "responses": {"preference": [{"value": ["response_2", "response_1"], "status": "submitted"}]},
    },
    "Argilla 2, columns": {
        **{"prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference.suggestion": "response_1"},
        **{"preference.responses": ["response_2"], "preference.responses.status": ["submitted"]},
    },
    "distilabel": {"input": ASK, "generations": [BAD, GOOD], "rank": [2, 1]},
    "HelpSteer2, preferences": {"prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
    "PKU-SafeRLHF, safety only": {"prompt": ASK, "response_0": GOOD, "response_1": BAD, "safer_response_id": 0},
    "the prompt is the input": {"input": ASK, "chosen": GOOD, "rejected": BAD},
    "OpenAI as JSON": {
        "input": json.dumps({"messages": [USER]}),
        **{"preferred_output": json.dumps([ANSWER]), "non_preferred_output": json.dumps([OTHER])},
    },
    "Alpaca ranking as JSON": {"instruction": ASK, "output": json.dumps([GOOD, BAD])},
    "ms-swift conversations": {"conversations": [sharegpt(USER), sharegpt(ANSWER)], "rejected_response": [BAD]},
    "lists of one text": {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]},
    "Gemini": {
        "contents": [{"role": "user", "parts": [{"text": ASK}]}],
        "chosen": {"role": "model", "parts": [{"text": GOOD}]},
        "rejected": {"role": "model", "parts": [{"text": BAD}]},
    },
    "other keys and roles": {
        "dialogue": [{"speaker": "Human", "message": ASK}],
        "chosen": {"from": "GPT", "content": "", "value": GOOD},
        "rejected": {"role": "Assistant", "content": {"type": "text", "text": BAD}},
    },
    "conversations as Python writes them": {"chosen": str([USER, ANSWER]), "rejected": str([USER, OTHER])},
    "a copy of the chosen conversation": {"messages": [USER, ANSWER], "chosen": GOOD, "rejected": BAD},
    "Capybara": {
        "conversation": [{"input": ASK, "output": GOOD}],
        **{"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    },
    "the prompt is repeated": {"prompt": ASK, "chosen": f"{ASK}\n{GOOD}", "rejected": f"{ASK}\n{BAD}"},
}


@pytest.mark.parametrize("row", SINGLE_TURN.values(), ids=SINGLE_TURN)
def test_a_layout_gives_the_same_pair_as_texts(row):
    assert layout_of(row, Spelling()) is not None
    assert one(row) == one(PLAIN)


CONVERSATIONS = {
    "Alpaca with a system prompt": ({"system": SYSTEM["content"], **PLAIN}, [SYSTEM, USER]),
    "a system message": ({"system_message": SYSTEM["content"], **PLAIN}, [SYSTEM, USER]),
    "Alpaca with history": ({**PLAIN, "history": [["Hello", "Hi."]]}, [*EARLIER, USER]),
    "history of turns": ({**PLAIN, "history": EARLIER}, [*EARLIER, USER]),
    "Orca": ({"system": SYSTEM["content"], "question": ASK, "chosen": GOOD, "rejected": BAD}, [SYSTEM, USER]),
    "the prompt is the first turn": (
        {"prompt": "Hello", "chosen": [*EARLIER, USER, ANSWER], "rejected": [*EARLIER, USER, OTHER]},
        [*EARLIER, USER],
    ),
    "the prompt is the last turn": (
        {"prompt": ASK, "chosen": [*EARLIER, USER, ANSWER], "rejected": [*EARLIER, USER, OTHER]},
        [*EARLIER, USER],
    ),
    "the prompt follows the system turn": (
        {"prompt": ASK, "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        [SYSTEM, USER],
    ),
    "a system prompt and whole conversations": (
        {"system": SYSTEM["content"], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        [SYSTEM, USER],
    ),
    "an HH transcript as prompt": ({"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"}, [USER]),
    "HH transcripts with their prompt": (
        {"prompt": HH, "chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"},
        [USER],
    ),
    "Nectar": (
        {"prompt": f"{HH} ", "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}], "turns": 1},
        [USER],
    ),
    "two assistant turns in a row": (
        {"chosen": [*EARLIER, EARLIER[1], USER, ANSWER], "rejected": [*EARLIER, EARLIER[1], USER, OTHER]},
        [*EARLIER, EARLIER[1], USER],
    ),
}


@pytest.mark.parametrize(("row", "turns"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_system_prompts_and_earlier_turns_are_kept(row, turns):
    pair = one(row)
    assert pair["turns"] == turns
    assert (pair["chosen"], pair["rejected"]) == (GOOD, BAD)


def test_the_input_of_an_instruction_joins_it():
    row = {"instruction": "Explain what follows.", "input": ASK, "chosen": GOOD, "rejected": BAD}
    assert one(row)["prompt"] == f"Explain what follows.\n\n{ASK}"


def test_a_system_prompt_of_each_completion_is_that_of_the_chosen_one():
    completions = [
        {"response": BAD, "overall_score": 3.0, "custom_system_prompt": "Be grumpy."},
        {"response": GOOD, "overall_score": 8.0, "custom_system_prompt": "Be kind."},
    ]
    pair = one({"instruction": ASK, "completions": completions})
    assert pair["turns"] == [{"role": "system", "content": "Be kind."}, USER]
    assert (pair["chosen_rating"], pair["rejected_rating"]) == (8.0, 3.0)


def test_a_repeated_prompt_is_noted():
    assert convert(SINGLE_TURN["the prompt is repeated"], Spelling(), "pairs").notes == [REPEATED_PROMPT]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_row_means_the_same_in_every_kind_of_file(tmp_path, kind):
    rows = [
        {"prompt": json.dumps([SYSTEM, USER]), "chosen": json.dumps([ANSWER]), "rejected": json.dumps([OTHER])},
        {"prompt": ASK, "chosen": '["a", "list"]', "rejected": "[sic]"},
        {"prompt": "{", "chosen": GOOD, "rejected": BAD},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    write_raw_pairs(read_files([str(path)]), tmp_path / "raw.parquet", "a", DataSettings(source="default"))
    table = pq.read_table(tmp_path / "raw.parquet").to_pylist()
    assert [read_turns(row["turns"] or []) for row in table] == [[SYSTEM, USER], [], []]
    assert [(row["chosen"], row["rejected"]) for row in table] == [
        (GOOD, BAD),
        ('["a", "list"]', "[sic]"),
        (GOOD, BAD),
    ]
