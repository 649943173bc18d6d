"""Demonstrations: every row is used, counted or quarantined, and none contains a held-out text."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data.formats import BEST_COMPLETION
from dpo.data.ingest import read_file_summaries
from dpo.data.sources import read_source
from dpo.engine.tokenization import encode_pairs
from tasks import ingest, validate
from tasks.common.paths import (
    BASE,
    DEMONSTRATIONS,
    METRICS,
    QUARANTINED_DEMONSTRATIONS,
    RAW_DEMONSTRATIONS,
    REPORTS,
    TRAIN,
)
from tests.support.models import chat_tokenizer

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml")
PAIRS = [
    {
        "prompt": f"Say something about film {i}.", "chosen": f"Film {i} is a joy and a delight.",
        "rejected": f"It is a bore, number {i}.", "split": "train" if i < 24 else "eval",
    }
    for i in range(40)
]  # fmt: skip
TURNS = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another one."},
    {"role": "assistant", "content": "Blue."},
]
GOOD = [
    {"prompt": "What is rain?", "completion": "Water that falls."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"prompt": TURNS[:1], "response": [TURNS[1]]},
    {"messages": TURNS},
    {
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
        "system": "Be short.",
    },
    {"prompt": "Which one?", "chosen": "This one.", "rejected": "None at all."},
    {"prompt": "Rate it.", "responses": ["Poor work.", "Great work."], "scores": [1, 5]},
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that ingests and validates pairs and demonstrations, and returns the metrics of the latter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tasks.tracking.runs.log_validation", lambda *_: None)
    chat_tokenizer().save_pretrained(BASE)

    def run(rows, pairs=PAIRS, **sft):
        for name, values in (("pairs", pairs), ("demonstrations", rows)):
            path = Path(f"data/own/{name}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in values))
        source = {"source": "data/own/demonstrations.jsonl"} if rows else {}
        params = dataclasses.replace(
            PARAMS,
            data=dataclasses.replace(PARAMS.data, source="data/own/pairs.jsonl", max_train_pairs=None),
            sft=dataclasses.replace(PARAMS.sft, **source, **sft),
            validate=dataclasses.replace(PARAMS.validate, max_quarantined=0.5),
        )
        for stage in (ingest, validate):
            monkeypatch.setattr(stage, "load_params", lambda: params)
            stage.main()
        return json.loads((METRICS / "validate.json").read_text()).get("demonstrations")

    return run


def used():
    return pd.read_parquet(DEMONSTRATIONS).to_dict("records")


def test_every_layout_gives_one_completion_per_row(project, capsys):
    metrics = project(GOOD)
    assert (metrics["rows"], metrics["accepted"], metrics["quarantined"]) == (7, 7, 0)
    rows = used()
    assert [row["chosen"] for row in rows] == [
        "Water that falls.", "3", "Red.", "Red.\n\nAnother one.\n\nBlue.", "Because.", "This one.", "Great work."
    ]  # fmt: skip
    assert [row["prompt"] for row in rows[:4]] == [
        "What is rain?",
        "Add.\n\n1 and 2",
        "Name a colour.",
        "Name a colour.",
    ]
    assert rows[4]["turns"][0]["content"] == "Be short."
    assert all(pd.isna(row["rejected"]) for row in rows)
    (summary,) = read_file_summaries(RAW_DEMONSTRATIONS).values()
    assert summary.layouts == {
        "prompt and completion": 3, "conversation": 2, "pairs": 1, "rated completions": 1
    }  # fmt: skip
    assert summary.notes == {BEST_COMPLETION: 2}
    assert "demonstrations: 7 rows: 7 accepted, 0 quarantined; train 7 (7 used)" in capsys.readouterr().out
    page = (REPORTS / "validate.html").read_text()
    assert "Demonstrations" in page
    assert BEST_COMPLETION in page
    assert "Demonstrations: 7 rows: 7 accepted" in (REPORTS / "validate.md").read_text()


def test_every_answer_of_a_conversation_is_learned_and_the_turns_between_them_are_context(project):
    project(GOOD)
    tokenizer = chat_tokenizer()
    rows = encode_pairs(used(), tokenizer, 512)
    assert all(len(row.completions) == 1 for row in rows)
    conversation = rows[3]
    (ids,), (places,) = conversation.completions, conversation.context
    learned = tokenizer.decode([token for place, token in enumerate(ids) if place not in places])
    assert learned == "Red.<|im_end|>Blue.<|im_end|>"
    assert "Another one." in tokenizer.decode([ids[place] for place in places])


BAD = [
    ({"prompt": "a", "completion": " "}, "empty_completion"),
    ({"prompt": "a"}, "missing_text"),
    ({"messages": TURNS[:3]}, "broken_roles"),
    ({"prompt": "a", "completion": "b<|im_start|>"}, "special_tokens"),
    ({"prompt": "a", "completion": "b", "images": ["x"]}, "unread_content"),
    ({"prompt": "a", "completion": "b\x00"}, "control_characters"),
    ({"prompt": "a", "completion": "b", "split": "other"}, "unknown_split"),
    ({"prompt": 3, "completion": "b"}, "wrong_type"),
    ({"prompt": "a", "completion": "b", "label": False}, "unread_content"),
    (GOOD[0], "duplicate_pair"),
    ({"prompt": PAIRS[30]["prompt"], "completion": "Something new."}, "prompt_in_both_splits"),
    ({"prompt": "Tell me.", "completion": PAIRS[30]["rejected"]}, "eval_text_in_train"),
]


@pytest.mark.parametrize(("row", "rule"), BAD)
def test_a_row_that_breaks_a_rule_is_quarantined_with_rule_file_and_line(project, row, rule):
    metrics = project([*GOOD, row])
    assert (metrics["rows"], metrics["accepted"], metrics["quarantined"]) == (8, 7, 1)
    assert metrics["rules"][rule] == 1
    (found,) = pd.read_parquet(QUARANTINED_DEMONSTRATIONS).to_dict("records")
    assert (found["rule"], found["line"], json.loads(found["original"])) == (rule, 8, row)


def test_rows_of_a_held_out_split_are_counted_and_not_trained_on(project, capsys):
    metrics = project([*GOOD, {"prompt": "Held?", "completion": "Out.", "split": "test"}])
    assert (metrics["accepted"], metrics["train"]["used"]) == (8, 7)
    assert "1 in a held-out split are not trained on" in capsys.readouterr().out
    assert "Held?" not in {row["prompt"] for row in used()}


def test_too_many_quarantined_rows_are_an_error(project):
    with pytest.raises(InputError, match=r"demonstrations: 53\.3% of the rows are quarantined"):
        project([*GOOD, *[{"prompt": f"{i}"} for i in range(8)]])


def test_no_pair_changes_if_there_are_demonstrations(project):
    assert project([]) is None
    assert used() == []
    before = TRAIN.read_bytes()
    project(GOOD)
    assert TRAIN.read_bytes() == before


def test_a_completion_that_is_too_long_names_the_fix(project):
    with pytest.raises(InputError, match=r"demonstrations: .*demonstrations\.jsonl, line 8: field 'chosen' has"):
        project([*GOOD, {"prompt": "a", "completion": "word " * 600}])
    assert not DEMONSTRATIONS.exists()


def test_errors_about_the_source_name_its_section():
    params = dataclasses.replace(PARAMS, sft=dataclasses.replace(PARAMS.sft, source="org/data"))
    with pytest.raises(InputError, match=r"params\.yaml: sft\.source: 'org/data' is not .* needs sft\.revision"):
        read_source(params.demonstrations, 1, "sft")
